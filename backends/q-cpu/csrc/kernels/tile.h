// The register tile that all matrix products share: a few tokens times a few rows, summed over features in the lanes.
//
// A sum has the same order whatever else is in its tile: a lane adds its features one after the other, and the lanes are added as
// a tree. So results depend neither on how many tokens or rows are computed together nor on where in a tile they lie.

#pragma once

#include "products.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kTileTokens = 4;
constexpr int kTileRows = 6;
#else
constexpr int kTileTokens = 3;
constexpr int kTileRows = 4;
#endif
constexpr int kTileSums = kTileTokens * kTileRows;

// Where the tokens or the rows of a tile lie: so many elements are they apart, and the vectors of one of them.
struct Strides {
  int64_t line, step;
};

// Sums of lanes are written four at a time.
constexpr int whole_sums(int count) { return (count + 3) / 4 * 4; }

#if defined(__AVX512F__)

// Four vectors to one whose lanes of 128 bits have a part of each one's sum.
inline __m512 fold_four(const Vector* v) {
  const __m512 a = reinterpret_cast<__m512>(v[0]), b = reinterpret_cast<__m512>(v[1]);
  const __m512 c = reinterpret_cast<__m512>(v[2]), d = reinterpret_cast<__m512>(v[3]);
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}

// Of two such, the lanes' first and third, and second and fourth, added.
inline __m512 fold_lanes(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}

// Adds the sum of each vector's lanes to its place in `sums`. A call, which gcc would make of it, costs as much as a sixth of a
// tile: all of its vectors would go through memory.
template <int Count>
__attribute__((always_inline)) inline void add_lanes(const Vector (&v)[Count], float* sums) {
  int i = 0;
#pragma GCC unroll 8
  for (; i + 16 <= Count; i += 16) {
    const __m512 low = fold_lanes(fold_four(v + i), fold_four(v + i + 4));
    const __m512 high = fold_lanes(fold_four(v + i + 8), fold_four(v + i + 12));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
    _mm512_storeu_ps(sums + i, _mm512_add_ps(_mm512_loadu_ps(sums + i), all));
  }
#pragma GCC unroll 8
  for (; i < Count; i += 4) {
    const __m512 four = fold_four(v + i);
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    const __m128 one = _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
    _mm_storeu_ps(sums + i, _mm_add_ps(_mm_loadu_ps(sums + i), one));
  }
}

#elif defined(__AVX2__)

template <int Count>
__attribute__((always_inline)) inline void add_lanes(const Vector (&v)[Count], float* sums) {
#pragma GCC unroll 8
  for (int i = 0; i < Count; i += 4) {
    const __m256 ab = _mm256_hadd_ps(reinterpret_cast<__m256>(v[i]), reinterpret_cast<__m256>(v[i + 1]));
    const __m256 cd = _mm256_hadd_ps(reinterpret_cast<__m256>(v[i + 2]), reinterpret_cast<__m256>(v[i + 3]));
    const __m256 four = _mm256_hadd_ps(ab, cd);
    const __m128 one = _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
    _mm_storeu_ps(sums + i, _mm_add_ps(_mm_loadu_ps(sums + i), one));
  }
}

#else

template <int Count>
__attribute__((always_inline)) inline void add_lanes(const Vector (&v)[Count], float* sums) {
  for (int i = 0; i < Count; ++i) sums[i] += sum_lanes(v[i]);
}

#endif

// Adds to `sums`, token by token, the products of `Tokens` tokens and `Rows` rows over `width` features. There is room for
// whole_sums(Tokens * Rows) of them. With `Prefetch` what lies at `next`, as these rows do, is fetched meanwhile, its vectors
// `next_step` apart.
template <class P, int Tokens, int Rows, bool Prefetch>
inline void multiply_tile(const typename P::X* x, Strides x_strides, const typename P::W* w, Strides w_strides, int64_t width,
                          float* sums, const typename P::W* next, int64_t next_step) {
  Vector tile[whole_sums(Tokens * Rows)] = {};
  int64_t k = 0;
  for (; k + P::kStep <= width; k += P::kStep, x += x_strides.step, w += w_strides.step, next += next_step) {
    typename P::Operand rows[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      rows[r] = P::load_w(w + r * w_strides.line);
      if (Prefetch) __builtin_prefetch(next + r * w_strides.line);
    }
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const typename P::Operand token = P::load_x(x + t * x_strides.line);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) tile[t * Rows + r] = P::multiply_add(token, rows[r], tile[t * Rows + r]);
    }
  }
  if (k < width) {
    typename P::Operand rows[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) rows[r] = P::load_some_w(w + r * w_strides.line, width - k);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const typename P::Operand token = P::load_some_x(x + t * x_strides.line, width - k);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) tile[t * Rows + r] = P::multiply_add(token, rows[r], tile[t * Rows + r]);
    }
  }
  add_lanes(tile, sums);
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
