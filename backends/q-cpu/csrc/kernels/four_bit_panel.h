// Decoding of 4-bit weights into the panels of panels.h.

#pragma once

#include "four_bit.h"
#include "gemm.h"
#include "panels.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

struct FourBitWeight {
  const uint8_t* packed;
  const float* absmax;
  const FourBitBook* book;
  int64_t blocksize;
  int shift;  // log2 of the blocksize
  int64_t K;
};

// Any row, wherever its codes and blocks begin and end.
template <class P>
inline void decode_row(const FourBitWeight& w, int64_t first, int64_t width, typename P::W* panel) {
  alignas(64) float decoded[kPanelK<P>];
  decode_4bit(w.packed, w.absmax, *w.book, w.blocksize, first, width, decoded);
  for (int64_t k = 0; k < width; k += P::kStep, panel += kRowStrides<P>.step) {
    to_numbers(decoded + k, smaller(P::kStep, width - k), panel);
  }
}

#if defined(__AVX512BF16__)

// The book scaled by a block's absmax, rounded once: twice over, so that a look-up ignores its fifth bit.
inline __m512i scaled_table(const FourBitBook& book, float absmax) {
  const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(book.values), _mm512_set1_ps(absmax));
  return _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(scaled)));
}

// The books scaled for two blocks, for look-ups whose fifth bit chooses.
inline __m512i scaled_tables(const FourBitBook& book, const float* absmax) {
  const __m512 values = _mm512_loadu_ps(book.values);
  const __m512 low = _mm512_mul_ps(values, _mm512_set1_ps(absmax[0]));
  const __m512 high = _mm512_mul_ps(values, _mm512_set1_ps(absmax[1]));
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// 16 bytes as 32 words, in the low bits of each its code, in element order; the bits above are of other codes.
inline __m512i spread_codes(const uint8_t* bytes) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  return _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
}

// A row whose vectors have one block each.
inline void decode_vectors(const FourBitWeight& w, int64_t first, int64_t width, Bf16* panel) {
  typedef Products<Bf16, Bf16> P;
  const uint8_t* bytes = w.packed + first / 2;
  for (int64_t k = 0; k < width; k += P::kStep, bytes += P::kStep / 2, panel += kRowStrides<P>.step) {
    const __m512i table = scaled_table(*w.book, w.absmax[(first + k) >> w.shift]);
    _mm512_store_si512(panel, _mm512_permutexvar_epi16(spread_codes(bytes), table));
  }
}

// A row whose vectors have two blocks each.
inline void decode_half_vectors(const FourBitWeight& w, int64_t first, int64_t width, Bf16* panel) {
  typedef Products<Bf16, Bf16> P;
  const __m512i upper_half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  const uint8_t* bytes = w.packed + first / 2;
  const float* absmax = w.absmax + (first >> w.shift);
  for (int64_t k = 0; k < width; k += P::kStep, bytes += P::kStep / 2, absmax += 2, panel += kRowStrides<P>.step) {
    const __m512i codes = _mm512_or_si512(_mm512_and_si512(spread_codes(bytes), _mm512_set1_epi16(15)), upper_half);
    _mm512_store_si512(panel, _mm512_permutexvar_epi16(codes, scaled_tables(*w.book, absmax)));
  }
}

template <>
inline void decode_row<Products<Bf16, Bf16>>(const FourBitWeight& w, int64_t first, int64_t width, Bf16* panel) {
  typedef Products<Bf16, Bf16> P;
  if (w.K % P::kStep == 0) {
    if (w.blocksize < P::kStep) return decode_half_vectors(w, first, width, panel);
    return decode_vectors(w, first, width, panel);
  }
  alignas(64) float decoded[kPanelK<P>];
  decode_4bit(w.packed, w.absmax, *w.book, w.blocksize, first, width, decoded);
  for (int64_t k = 0; k < width; k += P::kStep, panel += kRowStrides<P>.step) {
    to_numbers(decoded + k, smaller(P::kStep, width - k), panel);
  }
}

// A row of whole runs of 64 codes, each in one block: vectors of the even codes and of the odd ones alternate, because a byte's two
// then need not be brought beside each other.
inline void decode_even_odd(const FourBitWeight& w, int64_t first, int64_t width, Bf16* panel) {
  constexpr int64_t kStep = Products<Bf16, Bf16>::kStep, kNext = kRowStrides<Products<Bf16, Bf16>>.step;
  const uint8_t* bytes = w.packed + first / 2;
  const int64_t next_tile = kTileRows * w.K / 2;
  _mm_prefetch(w.absmax + ((first + kTileRows * w.K) >> w.shift), _MM_HINT_T0);
  for (int64_t k = 0; k < width; k += 2 * kStep, bytes += kStep, panel += 2 * kNext) {
    _mm_prefetch(bytes + next_tile, _MM_HINT_T0);
    const __m512i table = scaled_table(*w.book, w.absmax[(first + k) >> w.shift]);
    const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    _mm512_store_si512(panel, _mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), table));
    _mm512_store_si512(panel + kNext, _mm512_permutexvar_epi16(pairs, table));
  }
}

// Such rows for multiply_panels.
struct EvenOddRows {
  typedef Products<Bf16, Bf16> P;
  static constexpr bool kInPlace = false;
  static constexpr bool kEvenOdd = true;

  FourBitWeight w;

  static bool take(const FourBitWeight& w) { return w.blocksize >= 2 * P::kStep && w.K % (2 * P::kStep) == 0; }

  RowPanel<P> operator()(int64_t row, int64_t rows, int64_t k, int64_t width, Bf16* panel) const {
    for (int64_t r = 0; r < rows; ++r) decode_even_odd(w, (row + r) * w.K + k, width, panel + r * kRowStrides<P>.line);
    return {panel, kRowStrides<P>, 0};
  }
};

#endif

// The rows of a 4-bit weight for multiply_panels.
template <class P>
struct FourBitRows {
  static constexpr bool kInPlace = false;
  static constexpr bool kEvenOdd = false;

  FourBitWeight w;

  RowPanel<P> operator()(int64_t row, int64_t rows, int64_t k, int64_t width, typename P::W* panel) const {
    for (int64_t r = 0; r < rows; ++r) decode_row<P>(w, (row + r) * w.K + k, width, panel + r * kRowStrides<P>.line);
    return {panel, kRowStrides<P>, 0};
  }
};

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
