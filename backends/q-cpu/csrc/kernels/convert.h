// float32 to and from the 16-bit floats, rounded to nearest even as torch does.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "level.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr uint32_t kMagnitude = 0x7fffffffu;
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kNaN = 0x7fc00000u;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline float from_bf16(uint16_t half) { return from_bits(static_cast<uint32_t>(half) << 16); }

inline uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & kMagnitude) > kInfinity ? kNaN >> 16 : rounded);
}

inline float from_f16(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  // As a float32 with f16's exponent bits the value is 2^-112 of what it should be; subnormals come out right by the
  // multiplication.
  const uint32_t finite = bits_of(from_bits(magnitude << 13) * 0x1p112f);
  const uint32_t special = kInfinity | (magnitude << 13);
  return from_bits(sign | (magnitude >= 0x7c00u ? special : finite));
}

inline uint16_t to_f16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & kMagnitude;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  // From 2^-14 on: move the exponent's bias, and round the 13 bits that go; a carry into the exponent is right, up to infinity.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below: adding 0.5 leaves a subnormal f16's unit, 2^-24, as the sum's last bit, so the addition rounds.
  const uint32_t subnormal = bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > kInfinity ? 0x7e00u : half;
  return static_cast<uint16_t>(sign | half);
}

inline void load_bf16(const uint16_t* in, int64_t count, float* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_bf16(in[i]);
}

inline void store_bf16(const float* in, int64_t count, uint16_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_bf16(in[i]);
}

inline void load_f16(const uint16_t* in, int64_t count, float* __restrict out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
#endif
  for (; i < count; ++i) out[i] = from_f16(in[i]);
}

inline void store_f16(const float* in, int64_t count, uint16_t* __restrict out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
#endif
  for (; i < count; ++i) out[i] = to_f16(in[i]);
}

// Elements first…first + count of `data` as float32: in place if they are, else in `buffer`.
inline const float* load(const void* data, Float dtype, int64_t first, int64_t count, float* buffer) {
  if (dtype == Float::f32) return static_cast<const float*>(data) + first;
  const uint16_t* in = static_cast<const uint16_t*>(data) + first;
  if (dtype == Float::bf16) {
    load_bf16(in, count, buffer);
  } else {
    load_f16(in, count, buffer);
  }
  return buffer;
}

// Writes `count` values from element `first` of `data` on, each rounded once.
inline void store(const float* values, int64_t count, void* data, Float dtype, int64_t first) {
  if (dtype == Float::f32) {
    float* out = static_cast<float*>(data) + first;
    if (out != values) memcpy(out, values, static_cast<size_t>(count) * sizeof(float));
  } else if (dtype == Float::bf16) {
    store_bf16(values, count, static_cast<uint16_t*>(data) + first);
  } else {
    store_f16(values, count, static_cast<uint16_t*>(data) + first);
  }
}

// Where to compute values that `store` will write: the destination itself if it is float32.
inline float* destination(void* data, Float dtype, int64_t first, float* buffer) {
  return dtype == Float::f32 ? static_cast<float*>(data) + first : buffer;
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
