// Vectors as 128-bit parts of four lanes, quads.

#pragma once

#include "elements.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

// Four floats in each quad.
inline Vector repeat_quad(const float* four) {
#if defined(__AVX512F__)
  return same_bits<Vector>(_mm512_broadcast_f32x4(_mm_loadu_ps(four)));
#elif defined(__AVX2__)
  return same_bits<Vector>(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(four)));
#else
  return load_vector(four);
#endif
}

// Each quad's halves changed for each other, or the lanes of its halves.
template <int kDistance>
inline Vector swap_in_quads(Vector v) {
#if defined(__AVX512F__)
  return same_bits<Vector>(_mm512_permute_ps(same_bits<__m512>(v), kDistance == 2 ? 0x4e : 0xb1));
#elif defined(__AVX2__)
  return same_bits<Vector>(_mm256_permute_ps(same_bits<__m256>(v), kDistance == 2 ? 0x4e : 0xb1));
#else
  constexpr Integers kFrom = kDistance == 2 ? Integers{2, 3, 0, 1} : Integers{1, 0, 3, 2};
  return __builtin_shuffle(v, kFrom);
#endif
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
