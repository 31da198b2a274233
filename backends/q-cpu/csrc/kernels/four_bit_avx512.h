// The 4-bit codecs at the AVX-512 level: 64 elements, 32 bytes, at a time, tables in registers.
//
// A group of 64 is a part of one block, or two blocks of 32, or four of 16: kBlocks of them.

#pragma once

#include "blocks_avx512.h"
#include "four_bit_scale.h"
#include "narrow_avx512.h"
#include "stream.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int64_t kGroupBytes = kGroup / 2;

// Packed codes of 64 values, each scaled by the factor of its 16 and clamped to ±1.
inline __m256i encode_nibbles_64(const float* x, const __m512* factors, const FourBitBook& book) {
  const __m512 midpoints_low = _mm512_loadu_ps(book.cell_midpoints), midpoints_high = _mm512_loadu_ps(book.cell_midpoints + 16);
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512i cells[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512 s = _mm512_mul_ps(_mm512_loadu_ps(x + 16 * j), factors[j]);
    s = _mm512_max_ps(_mm512_min_ps(s, one), _mm512_set1_ps(-1.0f));
    const __m512i cell = _mm512_cvttps_epi32(_mm512_fmadd_ps(s, _mm512_set1_ps(kFourBitCellsPerUnit), _mm512_set1_ps(16.0f)));
    const __mmask16 above = _mm512_cmp_ps_mask(s, _mm512_permutex2var_ps(midpoints_low, cell, midpoints_high), _CMP_GT_OQ);
    cells[j] = _mm512_mask_add_epi32(cell, above, cell, _mm512_set1_epi32(kFourBitCells));
  }
  const __m512i codes = in_lane_order(_mm512_permutexvar_epi8(pack(cells), _mm512_loadu_si512(book.cell_codes)));
  // The first of two bytes times 16 plus the second.
  return _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0110)));
}

// The scales of a group's blocks.
struct GroupScales {
  __m512 factors[4];  // their reciprocals, for each 16 elements
  bool ordinary;      // all of them have one
};

template <int kBlocks>
inline GroupScales find_scales(const float* x, const FourBitBook& book, float tensor_scale, float* absmax) {
  constexpr int kParts = 4 / kBlocks;
  const __m512i magnitude = _mm512_set1_epi32(static_cast<int32_t>(kMagnitude));
  GroupScales result;
  result.ordinary = true;
#pragma GCC unroll 4
  for (int block = 0; block < kBlocks; ++block) {
    __m512i largest = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int part = block * kParts; part < (block + 1) * kParts; ++part) {
      fetch_ahead(x + 16 * part);
      largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_loadu_si512(x + 16 * part), magnitude));
    }
    absmax[block] = stored_scale(static_cast<uint32_t>(_mm512_reduce_max_epi32(largest)), book, tensor_scale);
    result.ordinary &= absmax[block] >= kSmallestNormal && is_scalable(bits_of(absmax[block]));
    const __m512 factor = _mm512_set1_ps(1.0f / absmax[block]);
#pragma GCC unroll 4
    for (int part = block * kParts; part < (block + 1) * kParts; ++part) result.factors[part] = factor;
  }
  return result;
}

// Encodes groups of whole blocks from the beginning of `count` elements on, as far as their scales are ordinary; returns how many
// elements. The scales of a group, a long chain of dependent steps, are begun before the group ahead of it is encoded.
template <int kBlocks>
inline int64_t encode_blocks(const float* x, int64_t count, const FourBitBook& book, float tensor_scale, float* absmax,
                             uint8_t* packed) {
  if (count < kGroup) return 0;
  GroupScales ahead = find_scales<kBlocks>(x, book, tensor_scale, absmax);
  int64_t i = 0;
  while (i + kGroup <= count && ahead.ordinary) {
    const GroupScales current = ahead;
    const int64_t next = i + kGroup;
    if (next + kGroup <= count) ahead = find_scales<kBlocks>(x + next, book, tensor_scale, absmax + next / kGroup * kBlocks);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + i / 2), encode_nibbles_64(x + i, current.factors, book));
    i = next;
  }
  return i;
}

inline int64_t encode_small_blocks(const float* x, int64_t count, int64_t blocksize, const FourBitBook& book, float tensor_scale,
                                   float* absmax, uint8_t* packed) {
  switch (blocksize) {
    case 16:
      return encode_blocks<4>(x, count, book, tensor_scale, absmax, packed);
    case 32:
      return encode_blocks<2>(x, count, book, tensor_scale, absmax, packed);
    case 64:
      return encode_blocks<1>(x, count, book, tensor_scale, absmax, packed);
    default:
      return 0;
  }
}

// Encodes the whole groups of a block with an ordinary scale; returns how many elements they are.
inline int64_t encode_groups(const float* x, int64_t count, float absmax, const FourBitBook& book, uint8_t* packed) {
  const __m512 factor = _mm512_set1_ps(1.0f / absmax);
  const __m512 factors[4] = {factor, factor, factor, factor};
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + i / 2), encode_nibbles_64(x + i, factors, book));
  }
  return i;
}

inline __m512 scaled_table(const FourBitBook& book, float absmax) {
  return _mm512_mul_ps(_mm512_loadu_ps(book.values), _mm512_set1_ps(absmax));
}

// Elements 16 * part … of a group from its codes. A dword has eight of them, the first in the high nibble of the lowest byte; the
// look-up heeds four bits of an index only.
inline __m512 decode_part(__m512i codes, int part, __m512 table) {
  const __m512i first = _mm512_set1_epi32(2 * part);
  const __m512i dwords = _mm512_add_epi32(first, _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1));
  const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_permutexvar_epi32(dwords, codes), shifts), table);
}

// The same for 16-bit elements, 32 of them, by a table of two blocks.
template <bool kOneBlock>
inline __m512i decode_half(__m512i codes, int half, __m512i tables) {
  alignas(64) static constexpr uint16_t kWords[2][32] = {
      {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7},
      {8, 8, 8, 8, 9, 9, 9, 9, 10, 10, 10, 10, 11, 11, 11, 11, 12, 12, 12, 12, 13, 13, 13, 13, 14, 14, 14, 14, 15, 15, 15, 15}};
  const __m512i shifts = _mm512_set1_epi64(0x0008000c00000004);
  __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi16(_mm512_load_si512(kWords[half]), codes), shifts);
  if (!kOneBlock) {  // the second half of the lanes looks up in the second block's table
    const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    index = _mm512_ternarylogic_epi32(index, _mm512_set1_epi16(15), upper, 0xea);  // (index & 15) | upper
  }
  return _mm512_permutexvar_epi16(index, tables);
}

// Decodes a group of kBlocks blocks.
template <Float kOut, bool kStream, int kBlocks>
inline void decode_group(const uint8_t* packed, const __m512* tables, void* out) {
  const __m512i codes = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  _mm_prefetch(reinterpret_cast<const char*>(packed + 2 * kPrefetchDistance), _MM_HINT_T0);
  if (kOut == Float::f32) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const __m512 values = decode_part(codes, part, tables[part * kBlocks / 4]);
      put<kStream>(static_cast<float*>(out) + 16 * part, _mm512_castps_si512(values));
    }
    return;
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m512 first = tables[half * kBlocks / 2];
    const __m512 second = tables[kBlocks == 4 ? 2 * half + 1 : half * kBlocks / 2];
    const __m256i narrow = narrowed<kOut>(first);
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(narrow), kBlocks == 4 ? narrowed<kOut>(second) : narrow, 1);
    put<kStream>(static_cast<uint16_t*>(out) + 32 * half, decode_half<kBlocks != 4>(codes, half, both));
  }
}

// Decodes what is whole groups of the blocks first…last, and returns the first block of those that are left.
template <Float kOut, bool kStream, int kBlocks>
inline int64_t decode_groups(const uint8_t* packed, const float* absmax, const FourBitBook& book, int64_t blocksize, int64_t numel,
                             void* out, int64_t first, int64_t last) {
  constexpr int64_t kSize = kOut == Float::f32 ? 4 : 2;
  const int64_t whole = smaller(last, numel / blocksize);
  int64_t block = first;
  for (; block + kBlocks <= whole; block += kBlocks) {
    __m512 tables[kBlocks];
    for (int i = 0; i < kBlocks; ++i) tables[i] = scaled_table(book, absmax[block + i]);
    const int64_t length = kBlocks == 1 ? blocksize : kGroup;
    for (int64_t i = block * blocksize; i < block * blocksize + length; i += kGroup) {
      decode_group<kOut, kStream, kBlocks>(packed + i / 2, tables, static_cast<char*>(out) + i * kSize);
    }
  }
  return block;
}

template <Float kOut, bool kStream>
inline int64_t decode_groups(const uint8_t* packed, const float* absmax, const FourBitBook& book, int64_t blocksize, int64_t numel,
                             void* out, int64_t first, int64_t last) {
  if (blocksize == 16) return decode_groups<kOut, kStream, 4>(packed, absmax, book, blocksize, numel, out, first, last);
  if (blocksize == 32) return decode_groups<kOut, kStream, 2>(packed, absmax, book, blocksize, numel, out, first, last);
  return decode_groups<kOut, kStream, 1>(packed, absmax, book, blocksize, numel, out, first, last);
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
