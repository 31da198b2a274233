// Decoding of packed 4-bit codes, two a byte, the first in the high nibble, to the integers of an Int8Book.

#pragma once

#include "int8.h"
#include "int8_dots.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

// The book as the dot products take weights: biased.
struct BiasedBook {
  alignas(64) int8_t values[64];  // four times, for look-ups within quarters of a vector

  explicit BiasedBook(const Int8Book& book) {
    for (int i = 0; i < 64; ++i) values[i] = static_cast<int8_t>(book.values[i % 16] + kBias);
  }
};

// A byte widened to 16 bits is split into its two codes in order, the high nibble first, by shifts in both directions.
#if defined(__AVX512F__)
inline __m512i decode_64(const uint8_t* bytes, __m512i values) {
  const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
  const __m512i codes = _mm512_or_si512(_mm512_srli_epi16(wide, 4), _mm512_slli_epi16(wide, 8));
  return _mm512_shuffle_epi8(values, _mm512_and_si512(codes, _mm512_set1_epi16(0x0f0f)));
}
#endif

// Decodes codes first…first + count.
inline void decode_codes(const uint8_t* packed, int64_t first, int64_t count, const BiasedBook& book, int8_t* __restrict out) {
  int64_t i = 0;
  if ((first & 1) && count > 0) {
    out[0] = book.values[packed[first >> 1] & 15];
    i = 1;
  }
  const uint8_t* bytes = packed + ((first + i) >> 1);
#if defined(__AVX512F__)
  const __m512i values = _mm512_load_si512(book.values);
  for (; i + 64 <= count; i += 64, bytes += 32) _mm512_storeu_si512(out + i, decode_64(bytes, values));
#elif defined(__AVX2__)
  const __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(book.values));
  for (; i + 32 <= count; i += 32, bytes += 16) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m256i codes = _mm256_or_si256(_mm256_srli_epi16(wide, 4), _mm256_slli_epi16(wide, 8));
    const __m256i decoded = _mm256_shuffle_epi8(values, _mm256_and_si256(codes, _mm256_set1_epi16(0x0f0f)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), decoded);
  }
#endif
  for (; i + 2 <= count; i += 2, ++bytes) {
    out[i] = book.values[*bytes >> 4];
    out[i + 1] = book.values[*bytes & 15];
  }
  if (i < count) out[i] = book.values[*bytes >> 4];
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
