// Decoding of packed 4-bit codes, two a byte, the first in the high nibble.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "convert.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

#if defined(__AVX2__)

constexpr int64_t kNibblesAtOnce = 16;

// The 16 codes of 8 bytes, one a byte, in element order.
inline __m128i split_nibbles(const uint8_t* bytes) {
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  const __m128i mask = _mm_set1_epi8(15);
  return _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(packed, 4), mask), _mm_and_si128(packed, mask));
}

#if defined(__AVX512F__)

inline void look_up_nibbles(const uint8_t* bytes, const float* table, float* out) {
  const __m512i codes = _mm512_cvtepu8_epi32(split_nibbles(bytes));
  _mm512_storeu_ps(out, _mm512_permutexvar_ps(codes, _mm512_loadu_ps(table)));
}

#else

inline __m256 look_up_eight(__m256i codes, __m256 low, __m256 high) {
  const __m256 upper_half = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));  // bit 3 as the sign
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), upper_half);
}

inline void look_up_nibbles(const uint8_t* bytes, const float* table, float* out) {
  const __m128i codes = split_nibbles(bytes);
  const __m256 low = _mm256_loadu_ps(table);
  const __m256 high = _mm256_loadu_ps(table + 8);
  _mm256_storeu_ps(out, look_up_eight(_mm256_cvtepu8_epi32(codes), low, high));
  _mm256_storeu_ps(out + 8, look_up_eight(_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8)), low, high));
}

#endif
#endif

// Looks up `count` codes from element `first` on.
inline void look_up(const uint8_t* packed, int64_t first, int64_t count, const float* table, float* __restrict out) {
  int64_t i = 0;
  if ((first & 1) && count > 0) {
    out[0] = table[packed[first >> 1] & 15];
    i = 1;
  }
  const uint8_t* bytes = packed + ((first + i) >> 1);
#if defined(__AVX2__)
  for (; i + kNibblesAtOnce <= count; i += kNibblesAtOnce, bytes += kNibblesAtOnce / 2) look_up_nibbles(bytes, table, out + i);
#endif
  for (; i + 2 <= count; i += 2, ++bytes) {
    out[i] = table[*bytes >> 4];
    out[i + 1] = table[*bytes & 15];
  }
  if (i < count) out[i] = table[*bytes >> 4];
}

// Decodes elements first…first + count, which may begin and end anywhere in their blocks. A block's scaled table gives the same
// bits as scaling each element, for 16 multiplications a block.
inline void decode_4bit(const uint8_t* packed, const float* absmax, const FourBitBook& book, int64_t blocksize, int64_t first,
                        int64_t count, float* __restrict out) {
  while (count > 0) {
    const int64_t block = first / blocksize;
    const int64_t part = smaller(count, (block + 1) * blocksize - first);
    float table[16];
    for (int code = 0; code < 16; ++code) table[code] = book.values[code] * absmax[block];
    look_up(packed, first, part, table, out);
    first += part;
    out += part;
    count -= part;
  }
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
