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

void split_into_planes(const uint32_t* values, uint8_t (*planes)[kBookSize]) {
  for (int i = 0; i < kBookSize; ++i) {
    for (int plane = 0; plane < 4; ++plane) planes[plane][i] = static_cast<uint8_t>(values[i] >> (8 * plane));
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

// A line in codes over magnitudes: through entries in the middle of equal steps, cut by half a step for the guess.
struct Line {
  double start;  // magnitude that it is drawn from
  double slope, offset;
};

// The lines through the decades of a dynamic map with `first` entries in the first decade, twice as many in each that follows.
void draw_lines(int first, LinearGuess* guess) {
  Line lines[kDecades + 1] = {{0, 0, 0}};
  int code = 1;  // after the zero
  for (int decade = 0; decade < kDecades; ++decade) {
    const int count = first << decade;
    const double start = std::pow(10.0, decade - kDecades);
    const double slope = count / (9 * start);
    // Halfway between the code and the one below, and half the width of a key up, as keys are cut off.
    lines[decade + 1] = {start, slope, code - start * slope - 0.4};
    code += count;
  }
  for (int binade = 0; binade < 32; ++binade) {
    const double begin = std::ldexp(1.0, binade - 31);
    int line = 0;
    while (line < kDecades && lines[line + 1].start <= begin) ++line;
    const bool has_two = line < kDecades && lines[line + 1].start < 2 * begin;
    guess->boundary[binade] = static_cast<uint16_t>((binade << 8) + 255);
    if (has_two) guess->boundary[binade] = static_cast<uint16_t>((binade << 8) + 256 * (lines[line + 1].start / begin - 1));
    for (const int second : {0, 1}) {
      const Line& through = lines[line + (second && has_two)];
      const double at_begin = std::max(0.0, through.offset + through.slope * begin);
      guess->slope[32 * second + binade] = static_cast<uint16_t>(std::lround(256 * through.slope * begin));
      guess->offset[32 * second + binade] = static_cast<uint16_t>(std::lround(256 * at_begin));
    }
  }
}

// As the kernels compute it, in 16 bits.
int32_t guessed(const LinearGuess& guess, uint32_t key) {
  const uint32_t binade = key >> 8;
  const uint32_t line = binade + (key > guess.boundary[binade] ? 32 : 0);
  const uint32_t mantissa = (key << 8) & 0xffffu;
  return static_cast<int32_t>((((mantissa * guess.slope[line]) >> 16) + guess.offset[line]) & 0xffffu) >> 8;
}

// Whether the guess is the code or the one below, for all magnitudes of every key. Keys above that of 1 don't occur.
bool guess_holds(const LinearGuess& guess, const Magnitudes& magnitudes) {
  const float* begin = magnitudes.midpoints;
  const float* end = begin + magnitudes.count - 1;
  const auto code_of = [&](uint32_t doubled) {
    return static_cast<int32_t>(std::lower_bound(begin, end, from_bits(doubled >> 1)) - begin);
  };
  constexpr uint32_t kKeyOfOne = 31 << 8;
  const int32_t limit = guess.mirrored ? kBookSize / 2 : kBookSize;
  const uint32_t step = guess.mirrored ? 2 : 1;
  for (uint32_t key = 0; key <= kKeyOfOne; key += step) {
    const uint32_t smallest = key == 0 ? 0 : (key + kGuessFirstKey) << 16;
    const uint32_t largest = ((key + kGuessFirstKey + step) << 16) - 1;
    const int32_t found = guessed(guess, key);
    if (found >= limit || found > code_of(smallest) || found < code_of(largest) - 1) return false;
  }
  return *begin > 0 && end[-1] < 1;
}

void build_guess(int size, CodeBook* book) {
  LinearGuess& guess = book->guess;
  guess.holds = false;
  guess.mirrored = is_mirrored(*book);
  if (!guess.mirrored && book->zero_code != 0) return;
  if (size - book->zero_code < 2) return;
  const Magnitudes magnitudes = magnitudes_of(*book, size);
  draw_lines(guess.mirrored ? 1 : 2, &guess);
  guess.holds = guess_holds(guess, magnitudes);
  uint32_t doubled[kBookSize];
  constexpr uint32_t kBeyondAny = 0x7fffffffu;  // for infinity: magnitudes go to 1, and their differences must not overflow
  for (int i = 0; i < kBookSize; ++i) doubled[i] = std::min(bits_of(magnitudes.midpoints[i]) << 1, kBeyondAny);
  split_into_planes(doubled, guess.midpoint_planes);
}

}  // namespace

void build_value_table(const float* entries, int size, float rest, ValueTable* table) {
  for (int i = 0; i < kBookSize; ++i) table->values[i] = i < size ? entries[i] : rest;
  uint32_t bits[kBookSize];
  std::memcpy(bits, table->values, sizeof bits);
  split_into_planes(bits, table->planes);
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
