// Elements read and written two vectors at a time, in whatever order is the cheapest to widen: what is computed element by element
// doesn't mind, and all that meets in it is read the same way.
//
// Of 16-bit elements a word of 32 bits holds two, and bfloat16 is the upper half of a float32: a shift gives the even elements, a
// mask the odd ones, where one after the other would take a permutation each.

#pragma once

#include "elements.h"
#include "stream.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int64_t kPair = 2 * kLanes;  // elements

struct Two {
  Vector a, b;
};

template <class T>
inline Two read_two(const T* from) {
  return {read(from), read(from + kLanes)};
}

inline Two read_two(const Bf16* from) {
  const Words words = load_raw<Words>(from);
  return {same_bits<Vector>(words << 16), same_bits<Vector>(words & 0xffff0000u)};
}

template <bool kStream>
inline void write_two(Two v, float* to) {
  put<kStream>(to, v.a);
  put<kStream>(to + kLanes, v.b);
}

template <bool kStream>
inline void write_two(Two v, F16* to) {
#if defined(__AVX512F__)
  const __m256i a = _mm512_cvtps_ph(same_bits<__m512>(v.a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i b = _mm512_cvtps_ph(same_bits<__m512>(v.b), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  put<kStream>(to, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
#elif defined(__F16C__)
  const __m128i a = _mm256_cvtps_ph(same_bits<__m256>(v.a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m128i b = _mm256_cvtps_ph(same_bits<__m256>(v.b), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  put<kStream>(to, _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1));
#else
  write(v.a, to);
  write(v.b, to + kLanes);
#endif
}

// A bfloat16 in the upper half of each word; NaN stays NaN.
inline Words rounded_to_upper_halves(Vector v) {
  const Words bits = same_bits<Words>(v);
  const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return ((bits & kMagnitude) > kInfinity ? Words{} + kNaN : rounded) & 0xffff0000u;
}

template <bool kStream>
inline void write_two(Two v, Bf16* to) {
#if defined(__AVX512BF16__)
  // The processor's own conversion takes subnormal numbers for zero.
  constexpr int kSubnormal = 0x20;
  const __m512 a = same_bits<__m512>(v.a), b = same_bits<__m512>(v.b);
  const unsigned subnormal = _mm512_fpclass_ps_mask(a, kSubnormal) | _mm512_fpclass_ps_mask(b, kSubnormal);
  if (__builtin_expect(subnormal == 0, true)) {
    alignas(64) static constexpr uint16_t kTurns[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512bh narrow = _mm512_cvtne2ps_pbh(b, a);
    return put<kStream>(to, _mm512_permutexvar_epi16(_mm512_load_si512(kTurns), same_bits<__m512i>(narrow)));
  }
#endif
  put<kStream>(to, rounded_to_upper_halves(v.a) >> 16 | rounded_to_upper_halves(v.b));
}

// The same of the first `count` elements, a pair of vectors or fewer: zeros after them, and nothing behind them read or written.
template <class T>
inline Two read_two(const T* from, int64_t count) {
  if (count == kPair) return read_two(from);
  T padded[kPair] = {};
  memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return read_two(padded);
}

template <bool kStream, class T>
inline void write_two(Two v, T* to, int64_t count) {
  if (count == kPair) return write_two<kStream>(v, to);
  T whole[kPair];
  write_two<false>(v, whole);
  memcpy(to, whole, static_cast<size_t>(count) * sizeof(T));
}

// Calls step(i, count) over 0…size in whole pairs of vectors, then once for what is left, if anything.
template <class Step>
inline void for_pairs(int64_t size, Step&& step) {
  int64_t i = 0;
  for (; i + kPair <= size; i += kPair) step(i, kPair);
  if (i < size) step(i, size - i);
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
