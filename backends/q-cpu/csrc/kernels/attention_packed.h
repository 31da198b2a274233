// Tiles of keys and values packed for many rows, so that nothing is summed across lanes, and the products of panels of rows with
// them.

#pragma once

#include "attention_tile.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

// Keys [kKeyTile, D] to [D / kDepth, kKeyTile], by squares of lanes.
template <class Tile, class T>
inline void pack_keys(const void* const* rows, int64_t D, float* packed) {
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
      store_square(d);
    }
    if (d < D) {
      for (int i = 0; i < kLanes; ++i) square[i] = read_some_lanes<Tile>(row[i] + d, D - d);
      store_square(d);
    }
  }
}

// Values [kKeyTile, D] to [kKeyTile / kDepth, columns].
template <class Tile, class T>
inline void pack_values(const void* const* rows, int64_t D, float* packed, int64_t columns) {
  for (int64_t key = 0; key < kKeyTile; key += Tile::kDepth) {
    float* out = packed + key / Tile::kDepth * columns;
    for (int64_t d = 0; d < D; d += Tile::kDepth * kLanes) {
      Vector vectors[Tile::kDepth];
      Tile::template read_columns<T>(rows + key, d, D, vectors);
      for (int v = 0; v < Tile::kDepth; ++v) write(vectors[v], out + d + v * kLanes);
    }
  }
}

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

// Calls work with the number of rows, 1…kPanelRows, as a constant.
template <int N>
struct Count {
  static constexpr int value = N;
};

template <class Work>
inline void with_rows(int64_t rows, Work&& work) {
  switch (rows) {
    case 1:
      return work(Count<1>{});
    case 2:
      return work(Count<2>{});
    case 3:
      return work(Count<3>{});
    case 4:
      return work(Count<4>{});
    case 5:
      return work(Count<5>{});
    case 6:
      return work(Count<6>{});
#if defined(__AVX512F__)
    case 7:
      return work(Count<7>{});
#endif
    default:
      return work(Count<kPanelRows>{});
  }
}

// sums += a · b along b's rows first, first + step, …
template <class Tile, int Rows, int Vectors>
inline void add_products(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t first, int64_t step,
                         int64_t depth, Vector (&sums)[Rows][Vectors]) {
  for (int64_t k = first; k < depth; k += step) {
    Vector columns[Vectors];
    for (int v = 0; v < Vectors; ++v) columns[v] = load_vector(b + k * b_stride + v * kLanes);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sums[r][v] = Tile::multiply(a[r * a_stride + k], columns[v], sums[r][v]);
  }
}

// products = queries · keys, of up to kPanelRows rows.
template <class Tile>
inline void multiply_keys(int64_t rows, const float* queries, int64_t depth, const float* keys, float* products) {
  with_rows(rows, [=](auto count) {
    constexpr int kRows = decltype(count)::value;
    constexpr int kVectors = kPanelVectors<kRows> < kTileVectors ? kPanelVectors<kRows> : kTileVectors;
    for (int64_t key = 0; key < kKeyTile; key += kVectors * kLanes) {
      for (int64_t phase = 0; phase < kPhases; ++phase) {
        Vector sums[kRows][kVectors] = {};
        add_products<Tile>(queries, depth, keys + key, kKeyTile, phase, kPhases, depth, sums);
        for (int r = 0; r < kRows; ++r) {
          for (int v = 0; v < kVectors; ++v) {
            float* to = products + r * kKeyTile + key + v * kLanes;
            write(phase == 0 ? sums[r][v] : load_vector(to) + sums[r][v], to);
          }
        }
      }
    }
  });
}

// outputs += weights · values, of up to kPanelRows rows.
template <class Tile>
inline void add_values(int64_t rows, const float* weights, const float* values, int64_t columns, float* outputs) {
  constexpr int64_t kDepth = kKeyTile / Tile::kDepth;
  with_rows(rows, [=](auto count) {
    constexpr int kRows = decltype(count)::value;
    const auto add = [=](int64_t column, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      Vector sums[kRows][kVectors];
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sums[r][v] = load_vector(outputs + r * columns + column + v * kLanes);
      add_products<Tile>(weights, kDepth, values + column, columns, 0, 1, kDepth, sums);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) write(sums[r][v], outputs + r * columns + column + v * kLanes);
    };
    int64_t column = 0;
    for (; column + kPanelVectors<kRows> * kLanes <= columns; column += kPanelVectors<kRows> * kLanes) {
      add(column, Count<kPanelVectors<kRows>>{});
    }
    for (; column < columns; column += 2 * kLanes) add(column, Count<2>{});
  });
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
