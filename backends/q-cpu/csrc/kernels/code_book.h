// Code books, and the nearest-entry search of one of up to 256 entries, exact and without branches.
//
// The code of s is the number of midpoints below s. Floats of one sign, exponent and seven leading mantissa bits form a cell; a
// table gives each cell the number of midpoints below all of it, and at most `steps` midpoints inside the cell are left to compare
// with. Cells are fine enough for the dynamic 8-bit maps to need one comparison; any other book is as right, with more.
//
// The dynamic maps have a faster way too, one that needs no loads from a table larger than registers: see LinearGuess.

#pragma once

#include <stdint.h>

namespace q_cpu {

constexpr int kBookSize = 256;
constexpr int kTableAlignment = 64;                        // of what is loaded by whole vectors
constexpr int kCellShift = 16;                             // leaves sign, exponent and 7 mantissa bits
constexpr int32_t kSmallestCell = (127 - 24) << 7;         // all magnitudes below 2^-24 share the first cell
constexpr int32_t kLastCell = (127 << 7) - kSmallestCell;  // magnitude 1
constexpr int32_t kCellsPerSign = kLastCell + 1;

// 256 floats, also as four tables of their bytes, the lowest first: 256 bytes fit into four vector registers.
struct ValueTable {
  alignas(kTableAlignment) float values[kBookSize];
  alignas(kTableAlignment) uint8_t planes[4][kBookSize];
};

// The code of a magnitude in 0…1 by a straight line for each binade, or by two that meet at `boundary`, as entries within a decade
// of a dynamic map are evenly spaced. In 16 bits: 5 of the exponent, 8 of the mantissa make the key of a magnitude; the line's
// value, cut to an integer, is its code or the one below it, so that one comparison with a midpoint is left.
//
// A signed map mirrors itself about its zero_code: the code of -s is zero_code minus that of s, where a tie goes to the higher
// magnitude. Bit patterns rotated left by one, so that the sign is last and lifts a tie, make one comparison of both. There a key
// has one bit less: it is even.
constexpr int kGuessKeys = 32 << 8;
constexpr int32_t kGuessFirstKey = (127 - 31) << 8;  // of all magnitudes below 2^-30; 16 bits after the sign

struct LinearGuess {
  bool holds;  // for every key; else the cells must be used
  bool mirrored;
  alignas(kTableAlignment) uint16_t boundary[32];  // the last key of a binade's first line
  alignas(kTableAlignment) uint16_t slope[64];     // in 1/256 codes a binade: of first lines, and then of second ones
  alignas(kTableAlignment) uint16_t offset[64];    // in 1/256 codes, at the beginning of the binade
  alignas(kTableAlignment) uint8_t midpoint_planes[4][kBookSize];  // midpoints by magnitude's code, twice their bit patterns
};

struct CodeBook {
  ValueTable table;            // padded with the last entry
  float midpoints[kBookSize];  // padded with infinity
  uint8_t cells[2 * kCellsPerSign];
  int32_t steps;
  uint8_t zero_code;
  LinearGuess guess;
};

// How the scales of a 4-bit type are rounded, see q_core.ops.quantize.
enum class ScaleRule : uint8_t { absmax, e8m0, e4m3 };

constexpr int kFourBitCells = 32;
constexpr float kFourBitCellsPerUnit = 15.99f;

// A 4-bit code book. The code of a scaled value s is `lowest_code` plus the steps of all midpoints below s.
//
// Or by cells of equal width: s is in the cell trunc(s * kFourBitCellsPerUnit + 16), rounded once before it is cut. No cell has two
// midpoints in it, so the code is cell_codes[cell] up to the cell's midpoint, and cell_codes[kFourBitCells + cell] above.
struct FourBitBook {
  alignas(kTableAlignment) float values[16];
  float midpoints[15];  // ascending, padded with infinity
  int32_t steps[15];    // difference between the codes on either side of a midpoint
  int32_t lowest_code;
  int32_t zero_code;
  ScaleRule scale;
  alignas(kTableAlignment) float cell_midpoints[kFourBitCells];  // infinity where there is none
  alignas(kTableAlignment) uint8_t cell_codes[2 * kFourBitCells];
};

// Fills `book` from `size` (2…256) ascending entries.
void build_code_book(const float* entries, int size, CodeBook* book);

// Fills the tables from `size` entries, `rest` after them.
void build_value_table(const float* entries, int size, float rest, ValueTable* table);

// Fills the cells from the rest of the book; false if a cell has two midpoints in it.
bool build_four_bit_cells(FourBitBook* book);

}  // namespace q_cpu
