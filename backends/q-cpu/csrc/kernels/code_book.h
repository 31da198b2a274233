// Code books, and the nearest-entry search of one of up to 256 entries, exact and without branches.
//
// The code of s is the number of midpoints below s. Floats of one sign, exponent and seven leading mantissa bits form a cell; a
// table gives each cell the number of midpoints below all of it, and at most `steps` midpoints inside the cell are left to compare
// with. Cells are fine enough for the dynamic 8-bit maps to need one comparison; any other book is as right, with more.

#pragma once

#include <stdint.h>

namespace q_cpu {

constexpr int kBookSize = 256;
constexpr int kCellShift = 16;                             // leaves sign, exponent and 7 mantissa bits
constexpr int32_t kSmallestCell = (127 - 24) << 7;         // all magnitudes below 2^-24 share the first cell
constexpr int32_t kLastCell = (127 << 7) - kSmallestCell;  // magnitude 1
constexpr int32_t kCellsPerSign = kLastCell + 1;

struct CodeBook {
  float values[kBookSize];     // padded with the last entry
  float midpoints[kBookSize];  // padded with infinity
  uint8_t cells[2 * kCellsPerSign];
  int32_t steps;
  uint8_t zero_code;
};

// A 4-bit code book. The code of a scaled value s is `lowest_code` plus the steps of all midpoints below s.
struct FourBitBook {
  float values[16];
  float midpoints[15];  // ascending, padded with infinity
  int32_t steps[15];    // difference between the codes on either side of a midpoint
  int32_t lowest_code;
  int32_t zero_code;
};

// Fills `book` from `size` (2…256) ascending entries.
void build_code_book(const float* entries, int size, CodeBook* book);

}  // namespace q_cpu
