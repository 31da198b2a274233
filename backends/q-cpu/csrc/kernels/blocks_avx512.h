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

constexpr int64_t kGroup = 64;  // codes at a time
constexpr int64_t kPrefetchDistance =
    1280;  // elements: far enough ahead for memory to answer, near enough to stay in L1 until then

inline void fetch_ahead(const float* x) { __builtin_prefetch(x + kPrefetchDistance, 0, 3); }

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
  return _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
}

inline __m512i look_up_256(const uint8_t* table, __m512i index, __mmask64 upper) {
  return _mm512_mask_mov_epi8(look_up_128(table, index), upper, look_up_128(table + 128, index));
}

struct Integers64 {
  __m512i part[4];
};

inline Integers64 interleave(__m512i byte0, __m512i byte1, __m512i byte2, __m512i byte3) {
  const __m512i low0 = _mm512_unpacklo_epi8(byte0, byte1), low1 = _mm512_unpackhi_epi8(byte0, byte1);
  const __m512i high0 = _mm512_unpacklo_epi8(byte2, byte3), high1 = _mm512_unpackhi_epi8(byte2, byte3);
  return {_mm512_unpacklo_epi16(low0, high0), _mm512_unpackhi_epi16(low0, high0), _mm512_unpacklo_epi16(low1, high1),
          _mm512_unpackhi_epi16(low1, high1)};
}

// The look-up of four bytes each in tables of 256, or of 128 for indices below.
inline Integers64 look_up(const uint8_t (*planes)[kBookSize], __m512i index) {
  const __mmask64 upper = _mm512_movepi8_mask(index);
  return interleave(look_up_256(planes[0], index, upper), look_up_256(planes[1], index, upper),
                    look_up_256(planes[2], index, upper), look_up_256(planes[3], index, upper));
}

inline Integers64 look_up_lower(const uint8_t (*planes)[kBookSize], __m512i index) {
  return interleave(look_up_128(planes[0], index), look_up_128(planes[1], index), look_up_128(planes[2], index),
                    look_up_128(planes[3], index));
}

// 64 integers of 0…255 to bytes, in lane order.
inline __m512i pack(const __m512i* codes) {
  return _mm512_packus_epi16(_mm512_packus_epi32(codes[0], codes[1]), _mm512_packus_epi32(codes[2], codes[3]));
}

// The upper halves of 32 dwords as words, in the order in which _mm512_packus_epi32 leaves them; and of 64 words as bytes, in that
// of _mm512_packus_epi16.
inline __m512i upper_words(__m512i first, __m512i second) {
  alignas(64) static constexpr uint16_t kIndex[32] = {1,  3,  5,  7,  33, 35, 37, 39, 9,  11, 13, 15, 41, 43, 45, 47,
                                                      17, 19, 21, 23, 49, 51, 53, 55, 25, 27, 29, 31, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(first, _mm512_load_si512(kIndex), second);
}

inline __m512i upper_bytes(__m512i first, __m512i second) {
  alignas(64) static constexpr uint8_t kIndex[64] = {1,  3,  5,  7,  9,  11, 13, 15, 65,  67,  69,  71,  73,  75,  77,  79,
                                                     17, 19, 21, 23, 25, 27, 29, 31, 81,  83,  85,  87,  89,  91,  93,  95,
                                                     33, 35, 37, 39, 41, 43, 45, 47, 97,  99,  101, 103, 105, 107, 109, 111,
                                                     49, 51, 53, 55, 57, 59, 61, 63, 113, 115, 117, 119, 121, 123, 125, 127};
  return _mm512_permutex2var_epi8(first, _mm512_load_si512(kIndex), second);
}

// The guesses at 32 codes, in 1/256, from the upper halves of doubled bit patterns.
inline __m512i guess_32(const LinearGuess& guess, __m512i upper) {
  const __m512i key = _mm512_subs_epu16(upper, _mm512_set1_epi16(kGuessFirstKey));
  const __m512i binade = _mm512_srli_epi16(key, 8);
  const __m512i boundary = _mm512_permutexvar_epi16(binade, _mm512_load_si512(guess.boundary));
  const __mmask32 beyond = _mm512_cmpgt_epu16_mask(key, boundary);
  const __m512i line = _mm512_mask_add_epi16(binade, beyond, binade, _mm512_set1_epi16(32));
  const __m512i slope = _mm512_permutex2var_epi16(_mm512_load_si512(guess.slope), line, _mm512_load_si512(guess.slope + 32));
  const __m512i offset = _mm512_permutex2var_epi16(_mm512_load_si512(guess.offset), line, _mm512_load_si512(guess.offset + 32));
  return _mm512_add_epi16(offset, _mm512_mulhi_epu16(_mm512_slli_epi16(key, 8), slope));
}

// The signs of 64 integers, in lane order.
inline __mmask64 signs_of(const __m512i* x) {
  return _mm512_movepi8_mask(_mm512_packs_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3])));
}

// Encoding of 64 scaled values of a book whose guess holds, half done. Values beyond ±1 by a rounding get the codes of ±1.
//
// Additions, unpacking and logic run on twice as many of a processor's units as shifts, permutations and comparisons into masks do;
// hence x + x for a shift, and the sign of a difference for a comparison.
struct Guess64 {
  __m512i doubled[4];  // bit patterns, the sign last
  __m512i lower;       // the code or the one below, in lane order
  __mmask64 negative;  // in lane order
};

template <bool kMirrored>
inline Guess64 guess_64(const Floats64& scaled, const LinearGuess& guess) {
  Guess64 result;
  __m512i upper[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i bits = _mm512_castps_si512(scaled.part[j]);
    const __m512i positive = _mm512_max_epi32(bits, _mm512_setzero_si512());
    result.doubled[j] = kMirrored ? _mm512_rol_epi32(bits, 1) : _mm512_add_epi32(positive, positive);
    upper[j] = kMirrored ? bits : result.doubled[j];
  }
  __m512i first = upper_words(upper[0], upper[1]);
  __m512i second = upper_words(upper[2], upper[3]);
  if (kMirrored) {  // patterns that are not doubled yet, for the signs in them
    result.negative = _mm512_movepi8_mask(upper_bytes(first, second));
    first = _mm512_add_epi16(first, first);
    second = _mm512_add_epi16(second, second);
  }
  result.lower = upper_bytes(guess_32(guess, first), guess_32(guess, second));
  return result;
}

template <bool kMirrored>
inline __m512i codes_of(const Guess64& guessed, const CodeBook& book) {
  const __m512i lower = guessed.lower;
  const Integers64 midpoints =
      kMirrored ? look_up_lower(book.guess.midpoint_planes, lower) : look_up(book.guess.midpoint_planes, lower);
  __m512i below[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) below[j] = _mm512_sub_epi32(midpoints.part[j], guessed.doubled[j]);
  const __m512i codes = _mm512_mask_add_epi8(lower, signs_of(below), lower, _mm512_set1_epi8(1));
  if (!kMirrored) return in_lane_order(codes);
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(book.zero_code));
  return in_lane_order(_mm512_mask_subs_epu8(_mm512_add_epi8(zero, codes), guessed.negative, zero, codes));
}

inline Floats64 scaled_64(const float* x, __m512 factor) {
  return {_mm512_mul_ps(_mm512_loadu_ps(x), factor), _mm512_mul_ps(_mm512_loadu_ps(x + 16), factor),
          _mm512_mul_ps(_mm512_loadu_ps(x + 32), factor), _mm512_mul_ps(_mm512_loadu_ps(x + 48), factor)};
}

// Each group's guess is begun before the group ahead of it is finished: the steps of one depend on each other, and a processor
// looks ahead by little more than a group.
template <bool kMirrored>
inline void encode_scaled_by(const float* x, int64_t count, float factor, const CodeBook& book, uint8_t* codes) {
  const __m512 by = _mm512_set1_ps(factor);
  int64_t i = 0;
  if (count >= kGroup) {
    Guess64 ahead = guess_64<kMirrored>(scaled_64(x, by), book.guess);
    for (; i + 2 * kGroup <= count; i += kGroup) {
      const Guess64 current = ahead;
      ahead = guess_64<kMirrored>(scaled_64(x + i + kGroup, by), book.guess);
      _mm512_storeu_si512(codes + i, codes_of<kMirrored>(current, book));
    }
    _mm512_storeu_si512(codes + i, codes_of<kMirrored>(ahead, book));
    i += kGroup;
  }
  if (i == count) return;
  const __mmask64 lanes = first_lanes(count - i);
  Floats64 scaled;
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) scaled.part[j] = _mm512_mul_ps(_mm512_maskz_loadu_ps(float_lanes(lanes, j), x + i + 16 * j), by);
  _mm512_mask_storeu_epi8(codes + i, lanes, codes_of<kMirrored>(guess_64<kMirrored>(scaled, book.guess), book));
}

// Writes past the caches where `kStream`; then `out` must be aligned to 64 bytes.
template <bool kStream>
inline void decode_block_by(const uint8_t* codes, int64_t count, const ValueTable& table, float absmax, float* out) {
  const __m512 by = _mm512_set1_ps(absmax);
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    const Integers64 values = look_up(table.planes, in_lane_order(_mm512_loadu_si512(codes + i)));
    _mm_prefetch(reinterpret_cast<const char*>(codes + i + 2 * kPrefetchDistance), _MM_HINT_T0);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(values.part[j]), by);
      if (kStream) {
        _mm512_stream_ps(out + i + 16 * j, value);
      } else {
        _mm512_storeu_ps(out + i + 16 * j, value);
      }
    }
  }
  if (i == count) return;
  const __mmask64 lanes = first_lanes(count - i);
  const Integers64 values = look_up(table.planes, in_lane_order(_mm512_maskz_loadu_epi8(lanes, codes + i)));
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm512_mask_storeu_ps(out + i + 16 * j, float_lanes(lanes, j), _mm512_mul_ps(_mm512_castsi512_ps(values.part[j]), by));
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
      fetch_ahead(from);
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
