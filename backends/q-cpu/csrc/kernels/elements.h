// Elements of every dtype that a tensor here may have, read as vectors of float32 and written back, whole vectors or parts of them.

#pragma once

#include "vector.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

// A type an element, so that a kernel is a template over what it reads.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
struct E4m3 {
  uint8_t bits;
};

typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes)));

// Not 0 + value, which is 0 for a negative 0 and so an addition indeed.
inline Vector broadcast(float value) { return value - Vector{}; }

template <class To, class From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
inline V load_raw(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

// Small integers, widened. The compiler's own conversion takes the vector apart.
inline Words widen_halves(const void* from) {
#if defined(__AVX512F__)
  return same_bits<Words>(_mm512_cvtepu16_epi32(load_raw<__m256i>(from)));
#elif defined(__AVX2__)
  return same_bits<Words>(_mm256_cvtepu16_epi32(load_raw<__m128i>(from)));
#else
  return __builtin_convertvector(load_raw<Halves>(from), Words);
#endif
}

inline Words widen_bytes(const void* from) {
#if defined(__AVX512F__)
  return same_bits<Words>(_mm512_cvtepu8_epi32(load_raw<__m128i>(from)));
#elif defined(__AVX2__)
  return same_bits<Words>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(load_raw<Bytes>(from), Words);
#endif
}

inline Integers widen_signed_bytes(const void* from) {
#if defined(__AVX512F__)
  return same_bits<Integers>(_mm512_cvtepi8_epi32(load_raw<__m128i>(from)));
#elif defined(__AVX2__)
  return same_bits<Integers>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(load_raw<SignedBytes>(from), Integers);
#endif
}

inline Vector read(const float* from) { return load_vector(from); }

inline Vector read(const Bf16* from) { return same_bits<Vector>(widen_halves(from) << 16); }

inline Vector read(const F16* from) {
#if defined(__AVX512F__)
  return same_bits<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  return same_bits<Vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  float values[kLanes];
  load_f16(&from->bits, kLanes, values);
  return load_vector(values);
#endif
}

inline Vector read(const int8_t* from) { return __builtin_convertvector(widen_signed_bytes(from), Vector); }

inline Vector read(const E4m3* from) {
  const Words codes = widen_bytes(from);
  const Words magnitude = codes & 0x7f;
  // With e4m3's exponent bits in float32's place the value is 2^-120 of what it should be; subnormals come out right.
  const Words finite = same_bits<Words>(same_bits<Vector>(magnitude << 20) * 0x1p120f);
  const Words value = magnitude == 0x7f ? Words{} + kNaN : finite;
  return same_bits<Vector>(value | (codes & 0x80) << 24);
}

// The first `count` elements, zeros after them; reads no more than they are.
template <class T>
inline Vector read_part(const T* from, int64_t count) {
  T padded[kLanes] = {};
  memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return read(padded);
}

inline void write(Vector v, float* to) { memcpy(to, &v, sizeof v); }

// Rounds to nearest even; subnormal numbers too, which the hardware's own conversion would flush.
inline void write(Vector v, Bf16* to) {
#if defined(__AVX512BF16__)
  constexpr int kSubnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(same_bits<__m512>(v), kSubnormal) == 0, true)) {
    const __m256bh rounded = _mm512_cvtneps_pbh(same_bits<__m512>(v));
    memcpy(to, &rounded, sizeof rounded);
    return;
  }
#endif
  const Words bits = same_bits<Words>(v);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Halves halves = __builtin_convertvector((bits & kMagnitude) > kInfinity ? Words{} + (kNaN >> 16) : rounded, Halves);
  memcpy(to, &halves, sizeof halves);
}

inline void write(Vector v, F16* to) {
#if defined(__AVX512F__)
  const __m256i halves = _mm512_cvtps_ph(same_bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
#elif defined(__F16C__)
  const __m128i halves = _mm256_cvtps_ph(same_bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
#else
  float values[kLanes];
  write(v, values);
  store_f16(values, kLanes, &to->bits);
#endif
}

template <class T>
inline void write_part(Vector v, T* to, int64_t count) {
  T whole[kLanes];
  write(v, whole);
  memcpy(to, whole, static_cast<size_t>(count) * sizeof(T));
}

// Calls work(Element{}) with the element type of a dtype.
template <class Work>
inline void with_element(Float dtype, Work&& work) {
  switch (dtype) {
    case Float::f32:
      return work(float{});
    case Float::bf16:
      return work(Bf16{});
    case Float::f16:
      return work(F16{});
  }
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
