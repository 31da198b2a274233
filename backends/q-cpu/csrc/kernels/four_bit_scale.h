// The scales of 4-bit blocks, rounded to what each type can store. The rules: q_core.ops.quantize.

#pragma once

#include "blocks.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

// 6 * 2^e with the smallest e in -127…125 for which that is not below absmax. As a float, 6 * 2^e is 1.5 * 2^(e + 2).
inline float power_of_two_scale(uint32_t absmax) {
  constexpr uint32_t kHalf = 0x400000u;  // the fraction of 1.5
  const uint32_t binade = absmax >> 23;
  const uint32_t fraction = absmax & (2 * kHalf - 1);
  uint32_t exponent = binade + (fraction > kHalf ? 1 : 0);
  exponent = exponent < 2 ? 2 : exponent > 254 ? 254 : exponent;
  return from_bits(exponent << 23 | kHalf);
}

// Rounded to E4M3, ties to even, of 2^-9…448.
inline float round_to_e4m3(float x) {
  constexpr float kSmallestNormalE4M3 = 0x1p-6f;
  if (x < kSmallestNormalE4M3) return x + 0x1p14f - 0x1p14f;  // the sum's last bit is worth 2^-9
  const uint32_t bits = bits_of(x);
  return from_bits((bits + 0x7ffffu + ((bits >> 20) & 1u)) & ~0xfffffu);
}

inline float e4m3_scale(float absmax, float tensor_scale) {
  const float ratio = absmax / (tensor_scale > 0.0f ? 6.0f * tensor_scale : 1.0f);
  const float capped = ratio > 448.0f ? 448.0f : ratio;
  return 6.0f * (tensor_scale * round_to_e4m3(capped < 0x1p-9f ? 0x1p-9f : capped));
}

// What is stored as a block's absmax, from its true one as a bit pattern. Zero and what is not finite stay.
inline float stored_scale(uint32_t bits, const FourBitBook& book, float tensor_scale) {
  if (book.scale == ScaleRule::absmax || !is_scalable(bits)) return absmax_value(bits);
  return book.scale == ScaleRule::e8m0 ? power_of_two_scale(bits) : e4m3_scale(from_bits(bits), tensor_scale);
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
