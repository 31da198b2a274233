// Vectors as wide as the level's registers: floats for products and sums, int8 widened for integer dot products.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "convert.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

inline Vector load_vector(const float* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

// The first `count` floats, zeros after them; reads no more than they are.
inline Vector load_part(const float* from, int64_t count) {
  Vector v = {};
  memcpy(&v, from, static_cast<size_t>(count) * sizeof(float));
  return v;
}

// a * b + c: fused where the level has it.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Vector>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

// Sum of the lanes, halves onto halves.
inline float sum_lanes(Vector v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#endif
  float lanes[kLanes];
  memcpy(lanes, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// int8 dot products go through a wider type in which no product overflows.
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));
#if defined(__AVX512F__)
typedef __m512i Widened;
constexpr int kWidened = 32;
#elif defined(__AVX2__)
typedef __m256i Widened;
constexpr int kWidened = 16;
#else
typedef Integers Widened;
constexpr int kWidened = 4;
#endif

inline Widened widen(const int8_t* from) {
#if defined(__AVX512F__)
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  return Integers{from[0], from[1], from[2], from[3]};
#endif
}

// The first `count` values, zeros after them; reads no more than they are.
inline Widened widen_part(const int8_t* from, int64_t count) {
  int8_t padded[kWidened] = {};
  memcpy(padded, from, static_cast<size_t>(count));
  return widen(padded);
}

inline Integers dot_add(Widened a, Widened b, Integers sums) {
#if defined(__AVX512F__)
  return reinterpret_cast<Integers>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sums), a, b));
#elif defined(__AVX2__)
  return sums + reinterpret_cast<Integers>(_mm256_madd_epi16(a, b));
#else
  return sums + a * b;
#endif
}

inline int32_t sum_integers(Integers v) {
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
