// Squares of lanes, rows to columns.

#pragma once

#include "elements.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

#if defined(__AVX512F__)

// Four vectors' 128-bit parts, each part's square by itself.
inline void transpose_quads(Vector (&four)[4]) {
  __m512 rows[4], pairs[4];
  memcpy(rows, four, sizeof rows);
  for (int i = 0; i < 4; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int half = 0; half < 2; ++half) {
    const __m512d a = _mm512_castps_pd(pairs[half]), b = _mm512_castps_pd(pairs[2 + half]);
    rows[2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    rows[2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  memcpy(four, rows, sizeof rows);
}

inline void transpose(Vector (&square)[kLanes]) {
  // fours[4q + c] has, in its 128-bit part p, column 4p + c of the rows 4q…4q + 3.
  __m512 rows[16], fours[16];
  for (int i = 0; i < 16; i += 4) {
    Vector four[4] = {square[i], square[i + 1], square[i + 2], square[i + 3]};
    transpose_quads(four);
    memcpy(fours + i, four, sizeof four);
  }
  constexpr int kEven = 0x88, kOdd = 0xdd;  // parts of both operands
  for (int c = 0; c < 4; ++c) {
    const __m512 even_low = _mm512_shuffle_f32x4(fours[c], fours[4 + c], kEven);
    const __m512 odd_low = _mm512_shuffle_f32x4(fours[c], fours[4 + c], kOdd);
    const __m512 even_high = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], kEven);
    const __m512 odd_high = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], kOdd);
    rows[c] = _mm512_shuffle_f32x4(even_low, even_high, kEven);
    rows[4 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, kEven);
    rows[8 + c] = _mm512_shuffle_f32x4(even_low, even_high, kOdd);
    rows[12 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, kOdd);
  }
  memcpy(square, rows, sizeof rows);
}

#elif defined(__AVX2__)

inline void transpose_quads(Vector (&four)[4]) {
  __m256 rows[4], pairs[4];
  memcpy(rows, four, sizeof rows);
  for (int i = 0; i < 4; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int half = 0; half < 2; ++half) {
    const __m256d a = _mm256_castps_pd(pairs[half]), b = _mm256_castps_pd(pairs[2 + half]);
    rows[2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
    rows[2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
  }
  memcpy(four, rows, sizeof rows);
}

inline void transpose(Vector (&square)[kLanes]) {
  __m256 rows[8], fours[8];
  for (int i = 0; i < 8; i += 4) {
    Vector four[4] = {square[i], square[i + 1], square[i + 2], square[i + 3]};
    transpose_quads(four);
    memcpy(fours + i, four, sizeof four);
  }
  for (int c = 0; c < 4; ++c) {
    rows[c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20);
    rows[4 + c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31);
  }
  memcpy(square, rows, sizeof rows);
}

#else

inline void transpose_quads(Vector (&four)[4]) {
  constexpr Integers kLow = {0, 4, 1, 5}, kHigh = {2, 6, 3, 7}, kFirst = {0, 1, 4, 5}, kSecond = {2, 3, 6, 7};
  const Vector low0 = __builtin_shuffle(four[0], four[1], kLow), high0 = __builtin_shuffle(four[0], four[1], kHigh);
  const Vector low1 = __builtin_shuffle(four[2], four[3], kLow), high1 = __builtin_shuffle(four[2], four[3], kHigh);
  four[0] = __builtin_shuffle(low0, low1, kFirst);
  four[1] = __builtin_shuffle(low0, low1, kSecond);
  four[2] = __builtin_shuffle(high0, high1, kFirst);
  four[3] = __builtin_shuffle(high0, high1, kSecond);
}

inline void transpose(Vector (&square)[kLanes]) { transpose_quads(square); }

#endif

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
