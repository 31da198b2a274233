// Element-wise arithmetic on vectors, with the same bits at every level: what optimizer rules are written in.

#pragma once

#include "vector.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

inline Vector broadcast(float value) { return Vector{} + value; }

inline void store_lanes(float* to, Vector v) { memcpy(to, &v, sizeof v); }

// Writes the first `count` lanes and nothing behind them.
inline void store_part(float* to, Vector v, int64_t count) { memcpy(to, &v, static_cast<size_t>(count) * sizeof(float)); }

inline Vector square_root(Vector v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(_mm512_sqrt_ps(reinterpret_cast<__m512>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector>(_mm256_sqrt_ps(reinterpret_cast<__m256>(v)));
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

inline Integers magnitude_bits(Vector v) { return reinterpret_cast<Integers>(v) & static_cast<int32_t>(kMagnitude); }

inline Integers larger(Integers a, Integers b) { return a > b ? a : b; }

inline uint32_t largest_lane(Integers v) {
#if defined(__AVX512F__)
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(reinterpret_cast<__m512i>(v)));
#else
  int32_t lanes[kLanes];
  memcpy(lanes, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  }
  return static_cast<uint32_t>(lanes[0]);
#endif
}

// -1, 0 or 1.
inline Vector sign_of(Vector v) {
  const Vector one = broadcast(1.0f);
  return v > 0.0f ? one : v < 0.0f ? -one : Vector{};
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
