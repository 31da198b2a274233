#include "code_book.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace q_cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kDecades = 7;

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

void split_into_planes(const float* values, uint8_t (*planes)[kBookSize]) {
  for (int i = 0; i < kBookSize; ++i) {
    const uint32_t bits = bits_of(values[i]);
    for (int plane = 0; plane < 4; ++plane) planes[plane][i] = static_cast<uint8_t>(bits >> (8 * plane));
  }
}

// The magnitudes of a book: all of it, or a mirrored one from its zero on.
struct Magnitudes {
  float midpoints[kBookSize];  // padded with infinity
  int count;
};

bool is_mirrored(const CodeBook& book) {
  for (int i = 0; i < book.zero_code; ++i) {
    if (book.midpoints[book.zero_code - 1 - i] != -book.midpoints[book.zero_code + i]) return false;
  }
  return book.zero_code > 0;
}

Magnitudes magnitudes_of(const CodeBook& book, int size) {
  Magnitudes result;
  result.count = size - book.zero_code;
  for (int i = 0; i < kBookSize; ++i) {
    result.midpoints[i] = i + 1 < result.count ? book.midpoints[book.zero_code + i] : kInfinity;
  }
  return result;
}

// The lines through the decades of a dynamic map with `first` entries in the first decade, twice as many in each that follows.
void draw_lines(int first, LinearGuess* guess) {
  float starts[kDecades];
  int code = 1;  // after the zero
  for (int decade = 0; decade < kDecades; ++decade) {
    const int count = first << decade;
    const double start = std::pow(10.0, decade - kDecades);
    const double spacing = 9 * start / count;
    starts[decade] = static_cast<float>(start);
    guess->slope[decade + 1] = static_cast<float>(1 / spacing);
    guess->offset[decade + 1] = static_cast<float>(code - start / spacing - 0.5);
    code += count;
  }
  guess->slope[0] = guess->offset[0] = 0;
  for (int i = kDecades + 1; i < 16; ++i) guess->slope[i] = guess->offset[i] = 0;
  for (int binade = 0; binade < 32; ++binade) {
    const float begin = std::ldexp(1.0f, binade - 31);
    const auto beyond = [&](float limit) { return static_cast<int32_t>(std::lower_bound(starts, starts + kDecades, limit) - starts); };
    guess->segment[binade] = beyond(begin);
    guess->boundary[binade] = beyond(2 * begin) > beyond(begin) ? starts[beyond(begin)] : kInfinity;
  }
}

int32_t guessed(const LinearGuess& guess, float s) {
  s = std::max(s, kGuessFloor);
  const uint32_t binade = (bits_of(s) >> 23) & 31;
  const int32_t segment = guess.segment[binade] + (s > guess.boundary[binade]);
  return static_cast<int32_t>(std::fma(s, guess.slope[segment], guess.offset[segment]));
}

// A guess rises with s within a segment, and so does the code; it is enough to look where a code or a segment begins and ends.
bool guess_holds(const LinearGuess& guess, const Magnitudes& magnitudes) {
  const float* begin = magnitudes.midpoints;
  const float* end = begin + magnitudes.count - 1;
  const int limit = guess.mirrored ? kBookSize / 2 : kBookSize;
  const auto holds_about = [&](float s) {
    for (const float at : {s, std::nextafter(s, kInfinity)}) {
      const auto code = static_cast<int32_t>(std::lower_bound(begin, end, at) - begin);
      const int32_t found = guessed(guess, at);
      if (found < 0 || found >= limit || (found != code && found != code - 1)) return false;
    }
    return true;
  };
  if (*begin <= kGuessFloor || end[-1] > 1) return false;
  for (const float* midpoint = begin; midpoint < end; ++midpoint) {
    if (!holds_about(*midpoint)) return false;
  }
  for (int binade = 0; binade < 32; ++binade) {
    if (guess.boundary[binade] != kInfinity && !holds_about(guess.boundary[binade])) return false;
    if (!holds_about(std::nextafter(std::ldexp(1.0f, binade - 31), 0.0f))) return false;
  }
  return holds_about(0) && holds_about(1);
}

void build_guess(int size, CodeBook* book) {
  LinearGuess& guess = book->guess;
  guess.holds = false;
  guess.mirrored = is_mirrored(*book);
  if (!guess.mirrored && book->zero_code != 0) return;
  if (size - book->zero_code < 3) return;
  const Magnitudes magnitudes = magnitudes_of(*book, size);
  draw_lines(guess.mirrored ? 1 : 2, &guess);
  guess.holds = guess_holds(guess, magnitudes);
  split_into_planes(magnitudes.midpoints, guess.midpoint_planes);
}

}  // namespace

void build_value_table(const float* entries, int size, float rest, ValueTable* table) {
  for (int i = 0; i < kBookSize; ++i) table->values[i] = i < size ? entries[i] : rest;
  split_into_planes(table->values, table->planes);
}

bool build_four_bit_cells(FourBitBook* book) {
  const auto is_in = [&](int midpoint, int cell) {
    if (midpoint == 15 || book->midpoints[midpoint] > 1) return false;
    return static_cast<int>(std::fma(book->midpoints[midpoint], kFourBitCellsPerUnit, 16.0f)) == cell;
  };
  int32_t code = book->lowest_code;
  int next = 0;
  for (int cell = 0; cell < kFourBitCells; ++cell) {
    book->cell_midpoints[cell] = is_in(next, cell) ? book->midpoints[next] : kInfinity;
    book->cell_codes[cell] = static_cast<uint8_t>(code);
    if (is_in(next, cell)) code += book->steps[next++];
    book->cell_codes[kFourBitCells + cell] = static_cast<uint8_t>(code);
    if (is_in(next, cell)) return false;
  }
  return true;
}

void build_code_book(const float* entries, int size, CodeBook* book) {
  build_value_table(entries, size, entries[size - 1], &book->table);
  for (int i = 0; i < kBookSize; ++i) {
    book->midpoints[i] = i + 1 < size ? (entries[i] + entries[i + 1]) / 2 : kInfinity;
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
  build_guess(size, book);
}

}  // namespace q_cpu
