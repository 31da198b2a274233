// The matrix products of attention, on tiles of keys brought into an order that needs no sums across lanes.
//
// Both products, scores = queries · keys and outputs += weights · values, are a panel of rows times a packed operand: `depth` rows
// of 32-bit lanes, each lane a column. In a *wide* tile a lane is one float32; in a *pair* tile it is two bfloat16 that follow
// each other along the depth, which one instruction multiplies and adds. A row's sums run along the depth in one order, whatever the
// other rows are.

#pragma once

#include "transpose.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

// Rows of a panel, and vectors of its columns that are summed at a time: as many sums as the registers hold.
#if defined(__AVX512F__)
constexpr int kPanelRows = 8;
template <int Rows>
constexpr int kPanelVectors = Rows > 6 ? 2 : 4;
#else
constexpr int kPanelRows = 6;
template <int Rows>
constexpr int kPanelVectors = 2;
#endif
constexpr int64_t kKeyTile = 32;  // keys packed together

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Where the keys and values of a tile lie; for those that are not to be read, a row of zeros.
struct TileRows {
  const void* key[kKeyTile];
  const void* value[kKeyTile];
};

// Cache lines of the rows that are needed next, asked for two at a time between other work. The rows lie in many pages, so the
// hardware can't guess them; and many requests at once would hold up the work's own.
class Ahead {
 public:
  Ahead(const void* const* rows, int64_t row_bytes) : rows_(rows), row_bytes_(row_bytes) {}

  void step() {
    if (row_ == kKeyTile) return;
    const char* line = static_cast<const char*>(rows_[row_]) + offset_;
    __builtin_prefetch(line);
    __builtin_prefetch(line + 64);
    offset_ += 128;
    if (offset_ < row_bytes_) return;
    offset_ = 0;
    ++row_;
  }

 private:
  const void* const* rows_;
  int64_t row_bytes_;
  int64_t row_ = 0;
  int64_t offset_ = 0;
};

// A vector of lanes from the first `count` elements, zeros after them; reads no more than they are.
template <class Tile, class T>
inline Vector read_some_lanes(const T* from, int64_t count) {
  constexpr int64_t kWhole = kLanes * Tile::kDepth;
  if (count >= kWhole) return Tile::read_lanes(from);
  T padded[kWhole] = {};
  memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return Tile::read_lanes(padded);
}

struct WideTile {
  static constexpr int64_t kDepth = 1;  // elements of a lane

  static Vector multiply(float a, Vector b, Vector sum) { return multiply_add(broadcast(a), b, sum); }

  template <class T>
  static Vector read_lanes(const T* from) {
    return read(from);
  }

  // Weights of the keys in order, from their vectors.
  static void store_weights(const Vector* weights, float* row) {
    for (int64_t i = 0; i < kKeyTile / kLanes; ++i) write(weights[i], row + i * kLanes);
  }

  template <class T>
  static void pack_values(const void* const* rows, int64_t D, float* packed, int64_t columns, Ahead& ahead) {
    for (int64_t key = 0; key < kKeyTile; ++key) {
      const T* row = static_cast<const T*>(rows[key]);
      float* out = packed + key * columns;
      int64_t d = 0;
      for (; d + kLanes <= D; d += kLanes) {
        if (d % (4 * kLanes) == 0) ahead.step();
        write(read(row + d), out + d);
      }
      if (d < D) write(read_part(row + d, D - d), out + d);
    }
  }
};

#if defined(__AVX512BF16__)

struct PairTile {
  static constexpr int64_t kDepth = 2;

  static Vector multiply(float a, Vector b, Vector sum) {
    const __m512 pair = _mm512_set1_ps(a);
    return same_bits<Vector>(_mm512_dpbf16_ps(same_bits<__m512>(sum), same_bits<__m512bh>(pair), same_bits<__m512bh>(b)));
  }

  // 32 elements as bfloat16. Codes are exact in it.
  static Vector read_lanes(const Bf16* from) { return load_raw<Vector>(from); }

  template <class Code>
  static Vector read_lanes(const Code* from) {
    const Vector low = read(from), high = read(from + kLanes);
    return same_bits<Vector>(_mm512_cvtne2ps_pbh(same_bits<__m512>(high), same_bits<__m512>(low)));
  }

  static void store_weights(const Vector* weights, float* row) {
    for (int64_t i = 0; i < kKeyTile / kLanes; i += 2) {
      const __m512bh pairs = _mm512_cvtne2ps_pbh(same_bits<__m512>(weights[i + 1]), same_bits<__m512>(weights[i]));
      memcpy(row + i * kLanes / 2, &pairs, sizeof pairs);
    }
  }

  template <class T>
  static void pack_values(const void* const* rows, int64_t D, float* packed, int64_t columns, Ahead& ahead) {
    // Words 0…15 and 16…31 of two keys, in turns.
    alignas(64) uint16_t low_words[32], high_words[32];
    for (uint16_t i = 0; i < 16; ++i) {
      low_words[2 * i] = i;
      low_words[2 * i + 1] = static_cast<uint16_t>(i + 32);
      high_words[2 * i] = static_cast<uint16_t>(i + 16);
      high_words[2 * i + 1] = static_cast<uint16_t>(i + 48);
    }
    const __m512i low = load_raw<__m512i>(low_words), high = load_raw<__m512i>(high_words);
    for (int64_t key = 0; key < kKeyTile; key += 2) {
      const T* row_a = static_cast<const T*>(rows[key]);
      const T* row_b = static_cast<const T*>(rows[key + 1]);
      float* out = packed + key / 2 * columns;
      for (int64_t d = 0; d < D; d += 2 * kLanes) {
        if (d % (4 * kLanes) == 0) ahead.step();
        const __m512i a = same_bits<__m512i>(read_some_lanes<PairTile>(row_a + d, D - d));
        const __m512i b = same_bits<__m512i>(read_some_lanes<PairTile>(row_b + d, D - d));
        _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(a, low, b));
        if (d + kLanes < columns) _mm512_storeu_si512(out + d + kLanes, _mm512_permutex2var_epi16(a, high, b));
      }
    }
  }
};

#endif

// Keys [kKeyTile, D] to [D / depth, kKeyTile], by squares of lanes.
template <class Tile, class T>
inline void pack_keys(const void* const* rows, int64_t D, float* packed, Ahead& ahead) {
  constexpr int64_t kStep = kLanes * Tile::kDepth;
  for (int64_t key = 0; key < kKeyTile; key += kLanes) {
    const T* row[kLanes];
    for (int i = 0; i < kLanes; ++i) row[i] = static_cast<const T*>(rows[key + i]);
    Vector square[kLanes];
    const auto store_square = [&](int64_t d) {
      transpose(square);
      for (int i = 0; i < kLanes; ++i) write(square[i], packed + (d / Tile::kDepth + i) * kKeyTile + key);
    };
    int64_t d = 0;
    for (; d + kStep <= D; d += kStep) {
      for (int i = 0; i < kLanes; ++i) square[i] = Tile::read_lanes(row[i] + d);
      for (int i = 0; i < kLanes / 4; ++i) ahead.step();
      store_square(d);
    }
    if (d < D) {
      for (int i = 0; i < kLanes; ++i) square[i] = read_some_lanes<Tile>(row[i] + d, D - d);
      store_square(d);
    }
  }
}

template <class Tile, int Rows, int Vectors, bool kAccumulate>
inline void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* c,
                           int64_t c_stride, Ahead& ahead) {
  Vector sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sums[r][v] = kAccumulate ? load_vector(c + r * c_stride + v * kLanes) : Vector{};
  Ahead lines = ahead;  // in registers
  for (int64_t k = 0; k < depth; ++k) {
    if (kAccumulate || k % 2 == 0) lines.step();
    Vector columns[Vectors];
    for (int v = 0; v < Vectors; ++v) columns[v] = load_vector(b + k * b_stride + v * kLanes);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sums[r][v] = Tile::multiply(a[r * a_stride + k], columns[v], sums[r][v]);
  }
  ahead = lines;
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) write(sums[r][v], c + r * c_stride + v * kLanes);
}

template <class Tile, int Rows, bool kAccumulate>
inline void multiply_rows(const float* a, int64_t a_stride, const float* b, int64_t columns, int64_t depth, float* c,
                          Ahead& ahead) {
  int64_t column = 0;
  constexpr int kVectors = kPanelVectors<Rows>;
  for (; column + kVectors * kLanes <= columns; column += kVectors * kLanes) {
    multiply_block<Tile, Rows, kVectors, kAccumulate>(a, a_stride, b + column, columns, depth, c + column, columns, ahead);
  }
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
    multiply_block<Tile, Rows, 2, kAccumulate>(a, a_stride, b + column, columns, depth, c + column, columns, ahead);
  }
  for (; column < columns; column += kLanes) {
    multiply_block<Tile, Rows, 1, kAccumulate>(a, a_stride, b + column, columns, depth, c + column, columns, ahead);
  }
}

// c = a · b, or c += a · b, of up to kPanelRows rows; rows of b and c are `columns` lanes, a multiple of kLanes.
template <class Tile, bool kAccumulate>
inline void multiply_panel(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t columns, int64_t depth, float* c,
                           Ahead& ahead) {
  switch (rows) {
    case 1:
      return multiply_rows<Tile, 1, kAccumulate>(a, a_stride, b, columns, depth, c, ahead);
    case 2:
      return multiply_rows<Tile, 2, kAccumulate>(a, a_stride, b, columns, depth, c, ahead);
    case 3:
      return multiply_rows<Tile, 3, kAccumulate>(a, a_stride, b, columns, depth, c, ahead);
    case 4:
      return multiply_rows<Tile, 4, kAccumulate>(a, a_stride, b, columns, depth, c, ahead);
    case 5:
      return multiply_rows<Tile, 5, kAccumulate>(a, a_stride, b, columns, depth, c, ahead);
    case 6:
      return multiply_rows<Tile, 6, kAccumulate>(a, a_stride, b, columns, depth, c, ahead);
#if defined(__AVX512F__)
    case 7:
      return multiply_rows<Tile, 7, kAccumulate>(a, a_stride, b, columns, depth, c, ahead);
#endif
    default:
      return multiply_rows<Tile, kPanelRows, kAccumulate>(a, a_stride, b, columns, depth, c, ahead);
  }
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
