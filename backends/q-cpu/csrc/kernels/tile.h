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

// Sums of the lanes of four vectors.
inline void sum_four(Vector a, Vector b, Vector c, Vector d, float* out) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)),
                                  _mm512_unpackhi_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(reinterpret_cast<__m512>(c), reinterpret_cast<__m512>(d)),
                                  _mm512_unpackhi_ps(reinterpret_cast<__m512>(c), reinterpret_cast<__m512>(d)));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#elif defined(__AVX2__)
  const __m256 ab = _mm256_hadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b));
  const __m256 cd = _mm256_hadd_ps(reinterpret_cast<__m256>(c), reinterpret_cast<__m256>(d));
  const __m256 abcd = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#else
  const Vector all[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) out[i] = sum_lanes(all[i]);
#endif
}

// Adds to `sums`, token by token, the products of `Tokens` tokens and `Rows` rows over `width` features.
template <class P, int Tokens, int Rows>
inline void multiply_tile(const typename P::Number* x, Strides x_strides, const typename P::Number* w, Strides w_strides,
                          int64_t width, float* sums) {
  constexpr int kSums = Tokens * Rows;
  Vector tile[(kSums + 3) / 4 * 4] = {};
  int64_t k = 0;
  for (; k + P::kStep <= width; k += P::kStep, x += x_strides.step, w += w_strides.step) {
    typename P::Operand rows[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) rows[r] = P::load(w + r * w_strides.line);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const typename P::Operand token = P::load(x + t * x_strides.line);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) tile[t * Rows + r] = P::multiply_add(token, rows[r], tile[t * Rows + r]);
    }
  }
  if (k < width) {
    typename P::Operand rows[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) rows[r] = P::load_some(w + r * w_strides.line, width - k);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const typename P::Operand token = P::load_some(x + t * x_strides.line, width - k);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) tile[t * Rows + r] = P::multiply_add(token, rows[r], tile[t * Rows + r]);
    }
  }
  float all[(kSums + 3) / 4 * 4];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; i += 4) sum_four(tile[i], tile[i + 1], tile[i + 2], tile[i + 3], all + i);
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sums[i] += all[i];
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
