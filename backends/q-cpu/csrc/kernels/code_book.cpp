#include "code_book.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace q_cpu {

namespace {

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

void build_code_book(const float* entries, int size, CodeBook* book) {
  for (int i = 0; i < kBookSize; ++i) {
    book->values[i] = entries[std::min(i, size - 1)];
    book->midpoints[i] = i + 1 < size ? (entries[i] + entries[i + 1]) / 2 : std::numeric_limits<float>::infinity();
  }
  const float* begin = book->midpoints;
  const float* end = begin + size - 1;
  const auto below = [&](float s) { return static_cast<int32_t>(std::lower_bound(begin, end, s) - begin); };

  book->zero_code = static_cast<uint8_t>(below(0.0f));
  book->steps = 0;
  for (int32_t cell = 0; cell < kCellsPerSign; ++cell) {
    const uint32_t key = static_cast<uint32_t>(cell + kSmallestCell);
    const float smallest = cell == 0 ? 0.0f : from_bits(key << kCellShift);
    const float largest = cell == kLastCell ? 1.0f : from_bits(((key + 1) << kCellShift) - 1);
    const int32_t positive = below(smallest);
    const int32_t negative = below(-largest);
    book->cells[cell] = static_cast<uint8_t>(positive);
    book->cells[kCellsPerSign + cell] = static_cast<uint8_t>(negative);
    book->steps = std::max({book->steps, below(largest) - positive, below(-smallest) - negative});
  }
}

}  // namespace q_cpu
