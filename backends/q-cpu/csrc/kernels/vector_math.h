// Functions of vectors: powers, hyperbolic tangent, extrema. Coefficients are a weighted minimax fit of the relative error.

#pragma once

#include "elements.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

// The larger of each lane; where one is NaN, b.
inline Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
  return same_bits<Vector>(_mm512_max_ps(same_bits<__m512>(a), same_bits<__m512>(b)));
#elif defined(__AVX2__)
  return same_bits<Vector>(_mm256_max_ps(same_bits<__m256>(a), same_bits<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

inline Vector lesser(Vector a, Vector b) {
#if defined(__AVX512F__)
  return same_bits<Vector>(_mm512_min_ps(same_bits<__m512>(a), same_bits<__m512>(b)));
#elif defined(__AVX2__)
  return same_bits<Vector>(_mm256_min_ps(same_bits<__m256>(a), same_bits<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

inline float larger(float a, float b) { return a > b ? a : b; }

inline float largest_lane(Vector v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(same_bits<__m512>(v));
#endif
  float lanes[kLanes];
  write(v, lanes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = larger(lanes[i], lanes[i + width]);
  }
  return lanes[0];
}

// The nearest integer, ties to even, of |x| < 2^22.
inline Vector round_lanes(Vector x) {
#if defined(__AVX512F__)
  return same_bits<Vector>(_mm512_roundscale_ps(same_bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  constexpr float kShift = 0x1.8p23f;
  return x + kShift - kShift;
#endif
}

#if defined(__AVX512F__)
constexpr float kSmallestPower = -152.0f;
#else
constexpr float kSmallestPower = -127.0f;
#endif

// x * 2^n for whole n of kSmallestPower…128, where the ends give 0 and infinity. A NaN in x stays.
inline Vector scale_by_power(Vector x, Vector n) {
#if defined(__AVX512F__)
  return same_bits<Vector>(_mm512_scalef_ps(same_bits<__m512>(x), same_bits<__m512>(n)));
#else
  return x * same_bits<Vector>((__builtin_convertvector(n, Integers) + 127) << 23);
#endif
}

// 2^f for |f| <= 1/2 to 2^-24 · 1.4, and exactly 1 at 0. Coefficients in pairs: fewer steps wait for each other than one by one.
inline Vector exp2_fraction(Vector f) {
  const Vector square = f * f;
  const Vector c12 = multiply_add(broadcast(0x1.ebfbdcp-3f), f, broadcast(0x1.62e430p-1f));
  const Vector c34 = multiply_add(broadcast(0x1.3b2d4cp-7f), f, broadcast(0x1.c6aee8p-5f));
  const Vector c56 = multiply_add(broadcast(0x1.41fbbcp-13f), f, broadcast(0x1.5f3e54p-10f));
  return multiply_add(multiply_add(multiply_add(c56, square, c34), square, c12), f, broadcast(1.0f));
}

// 2^x, to 1.5 units in the last place for -126 <= x < 127.5; 0 or subnormal below, infinity above.
inline Vector exp2_lanes(Vector x) {
  const Vector bounded = lesser(broadcast(128.0f), larger(broadcast(kSmallestPower), x));
  const Vector n = round_lanes(bounded);
  return scale_by_power(exp2_fraction(bounded - n), n);
}

inline float exp2_scalar(float x) { return exp2_lanes(broadcast(x))[0]; }

// e^x, to 2.5 units in the last place for -87 <= x < 88; 0 or subnormal below, infinity above.
inline Vector exp_lanes(Vector x) {
  constexpr float kLog2e = 0x1.715476p0f;
  constexpr float kLn2 = 0x1.62e430p-1f;
  const Vector bounded = lesser(broadcast(88.9f), larger(broadcast(kSmallestPower * kLn2), x));
  const Vector n = round_lanes(bounded * kLog2e);
#if defined(__FMA__)
  constexpr float kLog2eRest = 0x1.4ae0cp-26f;
  const Vector fraction = multiply_add(bounded, broadcast(kLog2eRest), multiply_add(bounded, broadcast(kLog2e), -n));
#else
  constexpr float kLn2High = 0x1.63p-1f;  // few bits, so that n times it is exact
  constexpr float kLn2Low = -0x1.bd0106p-13f;
  const Vector fraction = multiply_add(n, broadcast(-kLn2Low), multiply_add(n, broadcast(-kLn2High), bounded)) * kLog2e;
#endif
  return scale_by_power(exp2_fraction(fraction), n);
}

// e^-x by fewer steps than above, to 2^-23 · (1.5 + |x| / 40): infinity below -88.73, next to nothing or 0 from 87 on; a NaN may
// become any of it.
inline Vector short_exp_of_minus(Vector x) {
#if defined(__AVX512DQ__)
  constexpr int kLesserMagnitudeAndFirstSign = 2;
  const __m512 limit = same_bits<__m512>(broadcast(88.9f));
  const Vector bounded = same_bits<Vector>(_mm512_range_ps(same_bits<__m512>(x), limit, kLesserMagnitudeAndFirstSign));
#else
  const Vector bounded = lesser(broadcast(88.0f), larger(broadcast(-88.9f), x));
#endif
  const Vector n = round_lanes(bounded * -0x1.715476p0f);
#if defined(__FMA__)
  const Vector r = multiply_add(n, broadcast(-0x1.62e430p-1f), -bounded);
#else
  const Vector r = n * 0x1.bd0106p-13f - (n * 0x1.63p-1f + bounded);  // ln 2 by its first bits, for an exact product, and its rest
#endif
  Vector p = multiply_add(broadcast(0x1.1063f4p-7f), r, broadcast(0x1.572a1ap-5f));
  p = multiply_add(p, r, broadcast(0x1.5557acp-3f));
  p = multiply_add(p, r, broadcast(0x1.fffdfcp-2f));
  p = multiply_add(p, r, broadcast(1.0f));
  p = multiply_add(p, r, broadcast(1.0f));
  return scale_by_power(p, n);
}

// x / (1 + e^-x), to 2^-23 · (3 + |x| / 40); negative zero where e^-x overflows, below -88.73.
inline Vector silu_lanes(Vector x) { return x / (1.0f + short_exp_of_minus(x)); }

// 1 / x to a unit in the last place, for 1 <= x <= 2.
inline Vector reciprocal(Vector x) {
#if defined(__AVX512F__)
  const Vector guess = same_bits<Vector>(_mm512_rcp14_ps(same_bits<__m512>(x)));
  return multiply_add(guess, multiply_add(-x, guess, broadcast(1.0f)), guess);
#else
  return 1.0f / x;
#endif
}

// 1 / (1 + e^-x), to 5 units in the last place. The power is of -|x|, which doesn't overflow.
inline Vector sigmoid_lanes(Vector x) {
  const Vector power = exp_lanes(same_bits<Vector>(same_bits<Words>(x) | ~kMagnitude));
  const Vector half = reciprocal(1.0f + power);
  return x < 0.0f ? half * power : half;
}

// tanh x, to 3 units in the last place.
inline Vector tanh_lanes(Vector x) {
  const Vector magnitude = same_bits<Vector>(same_bits<Words>(x) & kMagnitude);
  const Vector square = x * x;
  Vector p = broadcast(-0x1.9b303ap-8f);
  p = multiply_add(p, square, broadcast(0x1.593d06p-6f));
  p = multiply_add(p, square, broadcast(-0x1.b9287ap-5f));
  p = multiply_add(p, square, broadcast(0x1.110d26p-3f));
  p = multiply_add(p, square, broadcast(-0x1.55554ap-2f));
  const Vector small = multiply_add(p * square, x, x);
  const Vector large = 1.0f - 2.0f / (exp_lanes(magnitude * 2.0f) + 1.0f);
  const Vector signed_large = same_bits<Vector>(same_bits<Words>(large) | (same_bits<Words>(x) & ~kMagnitude));
  return magnitude < 0.55f ? small : signed_large;
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
