// What a matrix product multiplies: vectors of activations and of weights, summed in float32.
//
// Everything is widened to float32, but for pairs of bfloat16 where the level has dot products of them (which take subnormal
// numbers for zero). `Products<X, W>` hides the difference: vectors of kStep features of a token and of a row, and what their
// product adds to a vector of sums.

#pragma once

#include "vector.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

// The 16-bit floats, told apart by type.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

#if defined(__AVX512F__)

// The lowest `count` bits, up to a vector's width.
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
inline __mmask32 first_words(int64_t count) { return static_cast<__mmask32>((uint64_t{1} << count) - 1); }

inline Vector widen_bf16(__m256i halves) { return reinterpret_cast<Vector>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }

inline Vector load_floats(const float* from) { return load_vector(from); }
inline Vector load_floats(const Bf16* from) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
inline Vector load_floats(const F16* from) {
  return reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}

// The first `count` values, zeros after them; these read no more than they are.
inline Vector load_some_floats(const float* from, int64_t count) {
  return reinterpret_cast<Vector>(_mm512_maskz_loadu_ps(first_lanes(count), from));
}
inline Vector load_some_floats(const Bf16* from, int64_t count) {
  return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}
inline Vector load_some_floats(const F16* from, int64_t count) {
  return reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), from)));
}

#else

inline Vector load_floats(const float* from) { return load_vector(from); }

#if defined(__AVX2__)

inline Vector load_floats(const Bf16* from) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return reinterpret_cast<Vector>(_mm256_slli_epi32(words, 16));
}
inline Vector load_floats(const F16* from) {
  return reinterpret_cast<Vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

#else

inline Vector load_floats(const Bf16* from) {
  Vector v;
  for (int i = 0; i < kLanes; ++i) v[i] = from_bf16(from[i].bits);
  return v;
}
inline Vector load_floats(const F16* from) {
  Vector v;
  for (int i = 0; i < kLanes; ++i) v[i] = from_f16(from[i].bits);
  return v;
}

#endif

template <class Number>
inline Vector load_some_floats(const Number* from, int64_t count) {
  Number padded[kLanes] = {};
  memcpy(padded, from, static_cast<size_t>(count) * sizeof(Number));
  return load_floats(padded);
}

#endif

template <class XNumber, class WNumber>
struct Products {
  typedef XNumber X;
  typedef WNumber W;
  typedef Vector Operand;
  static constexpr int64_t kStep = kLanes;

  static Operand load_x(const X* from) { return load_floats(from); }
  static Operand load_w(const W* from) { return load_floats(from); }
  static Operand load_some_x(const X* from, int64_t count) { return load_some_floats(from, count); }
  static Operand load_some_w(const W* from, int64_t count) { return load_some_floats(from, count); }
  static Vector multiply_add(Operand x, Operand w, Vector sums) { return q_cpu::Q_CPU_LEVEL::multiply_add(x, w, sums); }
};

#if defined(__AVX512BF16__)

template <>
struct Products<Bf16, Bf16> {
  typedef Bf16 X;
  typedef Bf16 W;
  typedef __m512i Operand;
  static constexpr int64_t kStep = 2 * kLanes;

  static Operand load_x(const Bf16* from) { return _mm512_loadu_si512(from); }
  static Operand load_w(const Bf16* from) { return _mm512_loadu_si512(from); }
  static Operand load_some_x(const Bf16* from, int64_t count) { return _mm512_maskz_loadu_epi16(first_words(count), from); }
  static Operand load_some_w(const Bf16* from, int64_t count) { return load_some_x(from, count); }
  static Vector multiply_add(Operand x, Operand w, Vector sums) {
    return reinterpret_cast<Vector>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w)));
  }
};

typedef Bf16 Packed16;  // what bfloat16 activations, and weights decoded for them, are packed as

#else

typedef float Packed16;

#endif

template <class X>
struct PackedAs {
  typedef float Number;
};
template <>
struct PackedAs<Bf16> {
  typedef Packed16 Number;
};

inline void to_numbers(const float* from, int64_t count, float* out) {
  memcpy(out, from, static_cast<size_t>(count) * sizeof(float));
}
inline void to_numbers(const float* from, int64_t count, Bf16* out) {
  for (int64_t i = 0; i < count; ++i) out[i].bits = to_bf16(from[i]);
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
