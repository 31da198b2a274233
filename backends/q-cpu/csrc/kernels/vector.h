// Vectors as wide as the level's registers: floats for products and sums, and integers of their size.

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

typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
