// Dot products of int8, exact at every level: along two rows, or word by word in tiles.
//
// AVX-512 VNNI multiplies unsigned with signed bytes. Weights are taken as w + kBias, which is w xor 0x80 read as unsigned, so that
// a dot product is too large by kBias times the sum of the other row. Without VNNI bytes are widened to int16 first, because the
// instruction on bytes would saturate, and the bias is 0. Sums wrap around, so they are right wherever the result fits int32.

#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "word_tile.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

#if defined(__AVX512VNNI__)

constexpr int32_t kBias = 128;
constexpr uint32_t kBiasWord = 0x80808080u;
constexpr int64_t kWordBytes = 4;  // int8 values in a word
constexpr int64_t kDotBytes = 64;  // int8 values in a step along rows
typedef __m512i DotBytes;

inline DotBytes load_bytes(const int8_t* from) { return _mm512_loadu_si512(from); }

// The first `count` values, zeros after them; reads no more than they are.
inline DotBytes load_bytes(const int8_t* from, int64_t count) {
  return _mm512_maskz_loadu_epi8(~uint64_t{0} >> (kDotBytes - count), from);
}

inline DotBytes biased(DotBytes w) { return _mm512_xor_si512(w, _mm512_set1_epi8(static_cast<char>(0x80))); }

inline Integers dot_add(Integers sums, DotBytes biased_w, DotBytes x) {
  return reinterpret_cast<Integers>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), biased_w, x));
}

struct Int8Dots {
  typedef Integers Sums;
  typedef int32_t Sum;
  static Integers add(Integers sums, Words biased_rows, Words token) {
    return dot_add(sums, reinterpret_cast<__m512i>(biased_rows), reinterpret_cast<__m512i>(token));
  }
};

inline void to_words(const int8_t* from, int64_t count, uint32_t* words) {
  words[(count - 1) / kWordBytes] = 0;
  memcpy(words, from, static_cast<size_t>(count));
}

#else

constexpr int32_t kBias = 0;
constexpr uint32_t kBiasWord = 0;
constexpr int64_t kWordBytes = 2;

#if defined(__AVX2__)
typedef __m256i DotBytes;
inline DotBytes widened(const int8_t* from) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Integers add_pairs(Integers sums, __m256i a, __m256i b) {
  return sums + reinterpret_cast<Integers>(_mm256_madd_epi16(a, b));
}
#elif defined(__SSE2__)
typedef __m128i DotBytes;
inline DotBytes widened(const int8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
}
inline Integers add_pairs(Integers sums, __m128i a, __m128i b) { return sums + reinterpret_cast<Integers>(_mm_madd_epi16(a, b)); }
#else
typedef int16_t DotBytes __attribute__((vector_size(kLanes * sizeof(uint32_t))));
inline DotBytes widened(const int8_t* from) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes * 2)));
  Bytes bytes;
  memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, DotBytes);
}
// Which half of a word is the first makes no difference to their sum.
inline Integers add_pairs(Integers sums, DotBytes a, DotBytes b) {
  const Integers wide_a = reinterpret_cast<Integers>(a), wide_b = reinterpret_cast<Integers>(b);
  return sums + (wide_a >> 16) * (wide_b >> 16) + (wide_a << 16 >> 16) * (wide_b << 16 >> 16);
}
#endif

constexpr int64_t kDotBytes = 2 * kLanes;

inline DotBytes load_bytes(const int8_t* from) { return widened(from); }

inline DotBytes load_bytes(const int8_t* from, int64_t count) {
  int8_t padded[kDotBytes] = {};
  memcpy(padded, from, static_cast<size_t>(count));
  return widened(padded);
}

inline DotBytes biased(DotBytes w) { return w; }

inline Integers dot_add(Integers sums, DotBytes w, DotBytes x) { return add_pairs(sums, w, x); }

struct Int8Dots {
  typedef Integers Sums;
  typedef int32_t Sum;
  static Integers add(Integers sums, Words rows, Words token) {
    return add_pairs(sums, reinterpret_cast<DotBytes>(rows), reinterpret_cast<DotBytes>(token));
  }
};

inline void to_words(const int8_t* from, int64_t count, uint32_t* words) {
  int64_t i = 0;
  for (; i + kDotBytes <= count; i += kDotBytes) {
    const DotBytes pairs = widened(from + i);
    memcpy(words + i / kWordBytes, &pairs, sizeof pairs);
  }
  if (i == count) return;
  const DotBytes pairs = load_bytes(from + i, count - i);
  memcpy(words + i / kWordBytes, &pairs, static_cast<size_t>((count - i + kWordBytes - 1) / kWordBytes) * sizeof(uint32_t));
}

#endif

// The words of a row's int8 values: where they lie, if those are words already, else in the buffer.
inline const char* int8_words(const int8_t* from, int64_t count, uint32_t* buffer) {
  if (kWordBytes == 4 && count % kWordBytes == 0) return reinterpret_cast<const char*>(from);
  to_words(from, count, buffer);
  return reinterpret_cast<const char*>(buffer);
}

inline TokenWords int8_tokens(const int8_t* x, int64_t stride, int64_t tokens, int64_t count, uint32_t* buffer) {
  if (kWordBytes == 4 && count % kWordBytes == 0) return {reinterpret_cast<const char*>(x), stride};
  for (int64_t t = 0; t < tokens; ++t) to_words(x + t * stride, count, buffer + t * kPackedWords);
  return {reinterpret_cast<const char*>(buffer), kPackedWords * static_cast<int64_t>(sizeof(uint32_t))};
}

// What a bias adds to the dot products of this row: kBias times its sum.
inline int32_t bias_of(const int8_t* x, int64_t count) {
  if (kBias == 0) return 0;
  Integers sums = {};
  const DotBytes zeros = biased(DotBytes{});
  int64_t i = 0;
  for (; i + kDotBytes <= count; i += kDotBytes) sums = dot_add(sums, zeros, load_bytes(x + i));
  if (i < count) sums = dot_add(sums, zeros, load_bytes(x + i, count - i));
  return sum_across(sums);
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
