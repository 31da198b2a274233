// The block-wise codec at the AVX-512 level: 64 codes at a time, all tables in registers.
//
// A table of 256 floats is held as four of bytes (ValueTable), so four look-ups of bytes and two rounds of interleaving give 64
// floats. Interleaving works within 128-bit lanes: codes are loaded and stored with their dwords in kLaneOrder, which cancels it.

#pragma once

#include <immintrin.h>

#include "code_book.h"
#include "convert.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int64_t kGroup = 64;               // codes at a time
constexpr int64_t kPrefetchDistance = 1024;  // elements: far enough ahead to hide memory's latency behind a few blocks

struct Floats64 {
  __m512 part[4];
};

// All bits up to `count`, of 0…63.
inline __mmask64 first_lanes(int64_t count) { return _bzhi_u64(~uint64_t{0}, static_cast<uint32_t>(count)); }

// Mask of the 16 floats that begin at element `at`, of which `count` exist.
inline __mmask16 float_lanes(__mmask64 lanes, int part) { return static_cast<__mmask16>(lanes >> (16 * part)); }

inline __m512i in_lane_order(__m512i codes) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), codes);
}

// The look-up of bytes in a table of 128, and of 256.
inline __m512i look_up_128(const uint8_t* table, __m512i index) {
  return _mm512_permutex2var_epi8(_mm512_loadu_si512(table), index, _mm512_loadu_si512(table + 64));
}

inline __m512i look_up_256(const uint8_t* table, __m512i index, __mmask64 upper) {
  return _mm512_mask_mov_epi8(look_up_128(table, index), upper, look_up_128(table + 128, index));
}

inline Floats64 interleave(__m512i byte0, __m512i byte1, __m512i byte2, __m512i byte3) {
  const __m512i low0 = _mm512_unpacklo_epi8(byte0, byte1), low1 = _mm512_unpackhi_epi8(byte0, byte1);
  const __m512i high0 = _mm512_unpacklo_epi8(byte2, byte3), high1 = _mm512_unpackhi_epi8(byte2, byte3);
  return {_mm512_castsi512_ps(_mm512_unpacklo_epi16(low0, high0)), _mm512_castsi512_ps(_mm512_unpackhi_epi16(low0, high0)),
          _mm512_castsi512_ps(_mm512_unpacklo_epi16(low1, high1)), _mm512_castsi512_ps(_mm512_unpackhi_epi16(low1, high1))};
}

inline Floats64 look_up_floats_128(const uint8_t (*planes)[kBookSize], __m512i index) {
  return interleave(look_up_128(planes[0], index), look_up_128(planes[1], index), look_up_128(planes[2], index),
                    look_up_128(planes[3], index));
}

inline Floats64 look_up_floats(const uint8_t (*planes)[kBookSize], __m512i index) {
  const __mmask64 upper = _mm512_movepi8_mask(index);
  return interleave(look_up_256(planes[0], index, upper), look_up_256(planes[1], index, upper),
                    look_up_256(planes[2], index, upper), look_up_256(planes[3], index, upper));
}

// 64 integers of 0…255 to bytes, in lane order.
inline __m512i pack(const __m512i* codes) {
  return _mm512_packus_epi16(_mm512_packus_epi32(codes[0], codes[1]), _mm512_packus_epi32(codes[2], codes[3]));
}

// Codes of 64 scaled values of a book whose guess holds. Values beyond ±1 by a rounding get the codes of ±1.
template <bool kMirrored>
inline __m512i encode_64(const Floats64& scaled, const CodeBook& book) {
  const LinearGuess& guess = book.guess;
  const __m512i one = _mm512_set1_epi32(1);
  __m512 magnitude[4];
  __m512i code[4];
  __m512i sign[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512i bits = _mm512_castps_si512(scaled.part[j]);
    if (kMirrored) {
      const __mmask16 negative = _mm512_movepi32_mask(bits);
      sign[j] = bits;
      bits = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int32_t>(kMagnitude)));
      bits = _mm512_mask_add_epi32(bits, negative, bits, one);
    }
    const __m512 s = _mm512_max_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(kGuessFloor));
    const __m512i binade = _mm512_srli_epi32(_mm512_castps_si512(s), 23);
    const __m512 boundary =
        _mm512_permutex2var_ps(_mm512_loadu_ps(guess.boundary), binade, _mm512_loadu_ps(guess.boundary + 16));
    __m512i segment =
        _mm512_permutex2var_epi32(_mm512_loadu_si512(guess.segment), binade, _mm512_loadu_si512(guess.segment + 16));
    segment = _mm512_mask_add_epi32(segment, _mm512_cmp_ps_mask(s, boundary, _CMP_GT_OQ), segment, one);
    code[j] = _mm512_cvttps_epi32(_mm512_fmadd_ps(s, _mm512_permutexvar_ps(segment, _mm512_loadu_ps(guess.slope)),
                                                  _mm512_permutexvar_ps(segment, _mm512_loadu_ps(guess.offset))));
    magnitude[j] = s;
  }
  const __m512i guesses = pack(code);
  const Floats64 midpoints =
      kMirrored ? look_up_floats_128(guess.midpoint_planes, guesses) : look_up_floats(guess.midpoint_planes, guesses);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __mmask16 above = _mm512_cmp_ps_mask(magnitude[j], midpoints.part[j], _CMP_GT_OQ);
    code[j] = _mm512_mask_add_epi32(code[j], above, code[j], one);
  }
  const __m512i codes = pack(code);
  if (!kMirrored) return in_lane_order(codes);
  const __mmask64 negative = _mm512_movepi8_mask(_mm512_packs_epi16(_mm512_packs_epi32(sign[0], sign[1]), _mm512_packs_epi32(sign[2], sign[3])));
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(book.zero_code));
  return in_lane_order(_mm512_mask_subs_epu8(_mm512_add_epi8(zero, codes), negative, zero, codes));
}

template <bool kMirrored>
inline void encode_scaled_by(const float* x, int64_t count, float factor, const CodeBook& book, uint8_t* codes) {
  const __m512 by = _mm512_set1_ps(factor);
  Floats64 scaled;
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) scaled.part[j] = _mm512_mul_ps(_mm512_loadu_ps(x + i + 16 * j), by);
    _mm512_storeu_si512(codes + i, encode_64<kMirrored>(scaled, book));
  }
  if (i == count) return;
  const __mmask64 lanes = first_lanes(count - i);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) scaled.part[j] = _mm512_mul_ps(_mm512_maskz_loadu_ps(float_lanes(lanes, j), x + i + 16 * j), by);
  _mm512_mask_storeu_epi8(codes + i, lanes, encode_64<kMirrored>(scaled, book));
}

// Writes past the caches where `kStream`; then `out` must be aligned to 64 bytes.
template <bool kStream>
inline void decode_block_by(const uint8_t* codes, int64_t count, const ValueTable& table, float absmax, float* out) {
  const __m512 by = _mm512_set1_ps(absmax);
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    const Floats64 values = look_up_floats(table.planes, in_lane_order(_mm512_loadu_si512(codes + i)));
    _mm_prefetch(reinterpret_cast<const char*>(codes + i + 2 * kPrefetchDistance), _MM_HINT_T0);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 value = _mm512_mul_ps(values.part[j], by);
      if (kStream) {
        _mm512_stream_ps(out + i + 16 * j, value);
      } else {
        _mm512_storeu_ps(out + i + 16 * j, value);
      }
    }
  }
  if (i == count) return;
  const __mmask64 lanes = first_lanes(count - i);
  const Floats64 values = look_up_floats(table.planes, in_lane_order(_mm512_maskz_loadu_epi8(lanes, codes + i)));
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm512_mask_storeu_ps(out + i + 16 * j, float_lanes(lanes, j), _mm512_mul_ps(values.part[j], by));
  }
}

inline uint32_t absmax_bits_512(const float* x, int64_t count) {
  const __m512i magnitude = _mm512_set1_epi32(static_cast<int32_t>(kMagnitude));
  __m512i largest[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const float* from = x + i + 16 * j;
      _mm_prefetch(reinterpret_cast<const char*>(from + kPrefetchDistance), _MM_HINT_T0);
      largest[j] = _mm512_max_epi32(largest[j], _mm512_and_si512(_mm512_loadu_si512(from), magnitude));
    }
  }
  const __mmask64 lanes = first_lanes(count - i);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i bits = _mm512_maskz_loadu_epi32(float_lanes(lanes, j), x + i + 16 * j);
    largest[j] = _mm512_max_epi32(largest[j], _mm512_and_si512(bits, magnitude));
  }
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(
      _mm512_max_epi32(_mm512_max_epi32(largest[0], largest[1]), _mm512_max_epi32(largest[2], largest[3]))));
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
