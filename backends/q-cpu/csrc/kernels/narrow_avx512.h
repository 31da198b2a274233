// float32 narrowed to the output's dtype at the AVX-512 level.

#pragma once

#include <immintrin.h>

#include "convert.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

// To bfloat16 as `to_bf16` rounds; the processor's own conversion takes subnormal numbers for zero.
inline __m256i narrowed_bf16(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(kNaN >> 16)));
}

template <Float kOut>
inline __m256i narrowed(__m512 values) {
  if (kOut == Float::bf16) return narrowed_bf16(values);
  return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
