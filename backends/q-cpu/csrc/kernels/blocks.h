// The rule that all block-wise formats share: absmax of a block, values scaled by it, codes of a 256-entry book.

#pragma once

#include "code_book.h"
#include "convert.h"
#if defined(__AVX512VBMI__)
#include "blocks_avx512.h"
#endif

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr float kSmallestNormal = 0x1p-126f;
constexpr int64_t kChunk = 256;  // elements scaled and encoded at a time, in L1

// max |x| as a bit pattern. Magnitudes order as integers do, with infinity and then NaN above all numbers, so one integer maximum
// also tells whether a block is finite.
inline uint32_t absmax_bits(const float* x, int64_t count) {
#if defined(__AVX512VBMI__)
  return absmax_bits_512(x, count);
#else
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(x[i]) & kMagnitude);
    largest = largest > magnitude ? largest : magnitude;
  }
  return static_cast<uint32_t>(largest);
#endif
}

inline float absmax_value(uint32_t bits) { return from_bits(bits > kInfinity ? kNaN : bits); }

// Whether a block has scaled values at all; one of zeros and one with a non-finite element get the code of 0 throughout.
inline bool is_scalable(uint32_t bits) { return bits != 0 && bits < kInfinity; }

// s = x / absmax by the rule: a multiplication with the rounded reciprocal, a division where that would overflow.
inline void scale_block(const float* x, int64_t count, float absmax, float* __restrict s) {
  if (absmax < kSmallestNormal) {
    for (int64_t i = 0; i < count; ++i) s[i] = x[i] / absmax;
    return;
  }
  const float reciprocal = 1.0f / absmax;
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = x[i] * reciprocal;
    const float capped = scaled > 1.0f ? 1.0f : scaled;
    s[i] = capped < -1.0f ? -1.0f : capped;
  }
}

inline void encode_scaled(const float* s, int64_t count, const CodeBook& book, uint8_t* __restrict codes) {
  uint16_t cells[kChunk];
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(s[i]);
    int32_t cell = static_cast<int32_t>((bits & kMagnitude) >> kCellShift) - kSmallestCell;
    cell = cell < 0 ? 0 : cell;
    // No value is above 1, but with denormals flushed (torch.set_flush_denormal) NaN may come here, and must stay inside the table.
    cell = cell > kLastCell ? kLastCell : cell;
    cells[i] = static_cast<uint16_t>(bits >> 31 ? cell + kCellsPerSign : cell);
  }
  if (book.steps <= 1) {
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t code = book.cells[cells[i]];
      codes[i] = static_cast<uint8_t>(code + (book.midpoints[code] < s[i]));
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    uint8_t code = book.cells[cells[i]];
    for (int32_t step = 0; step < book.steps; ++step) code = static_cast<uint8_t>(code + (book.midpoints[code] < s[i]));
    codes[i] = code;
  }
}

// Codes of a block that has scaled values.
inline void encode_scalable(const float* x, int64_t count, float absmax, const CodeBook& book, uint8_t* codes) {
#if defined(__AVX512VBMI__)
  if (book.guess.holds && absmax >= kSmallestNormal) {
    const float reciprocal = 1.0f / absmax;
    if (book.guess.mirrored) return encode_scaled_by<true>(x, count, reciprocal, book, codes);
    return encode_scaled_by<false>(x, count, reciprocal, book, codes);
  }
#endif
  float s[kChunk];
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t part = smaller(kChunk, count - i);
    scale_block(x + i, part, absmax, s);
    encode_scaled(s, part, book, codes + i);
  }
}

// Encodes a block whose largest magnitude is known, as a bit pattern, and returns its absmax. This and decode_block are called once
// a block, and are too long for a copy in every optimizer rule.
__attribute__((noinline, unused)) float encode_block(const float* x, int64_t count, uint32_t bits, const CodeBook& book,
                                                     uint8_t* codes) {
  const float absmax = absmax_value(bits);
  if (is_scalable(bits)) {
    encode_scalable(x, count, absmax, book, codes);
  } else {
    memset(codes, book.zero_code, static_cast<size_t>(count));
  }
  return absmax;
}

__attribute__((noinline, unused)) void decode_block(const uint8_t* codes, int64_t count, const ValueTable& table, float absmax,
                                                    float* __restrict out) {
#if defined(__AVX512VBMI__)
  decode_block_by<false>(codes, count, table, absmax, out);
#else
  for (int64_t i = 0; i < count; ++i) out[i] = table.values[codes[i]] * absmax;
#endif
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
