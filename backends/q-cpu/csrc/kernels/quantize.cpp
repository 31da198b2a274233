// Quantization and its inverse, in flat blocks and in rows.

#include "quantize.h"

#include "blocks.h"
#include "four_bit.h"
#include "four_bit_scale.h"
#include "vector.h"
#if defined(__AVX512VBMI__)
#include "four_bit_avx512.h"
#endif

namespace q_cpu::Q_CPU_LEVEL {
namespace {

inline int64_t block_length(int64_t block, int64_t blocksize, int64_t numel) {
  return smaller(blocksize, numel - block * blocksize);
}

// Codes of scaled values, one a byte, in whole vectors: both buffers have room up to the next multiple of kLanes. Each midpoint
// below s adds its step; a comparison of vectors gives -1 where it holds.
inline void encode_nibbles(const float* s, int64_t count, const FourBitBook& book, uint8_t* codes) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vector scaled = load_vector(s + i);
    Integers code = Integers{} + book.lowest_code;
    for (int j = 0; j < 15; ++j) code += (Vector{} + book.midpoints[j] < scaled) & book.steps[j];
    const Bytes bytes = __builtin_convertvector(code, Bytes);
    memcpy(codes + i, &bytes, sizeof bytes);
  }
}

// Packs an even number of codes.
inline void pack_nibbles(const uint8_t* codes, int64_t bytes, uint8_t* __restrict packed) {
  for (int64_t i = 0; i < bytes; ++i) packed[i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
}

// Encodes a block into (count + 1) / 2 bytes by its scale.
inline void encode_block_4bit(const float* x, int64_t count, float absmax, const FourBitBook& book, uint8_t* packed) {
  const uint8_t zero = static_cast<uint8_t>(book.zero_code);
  if (!is_scalable(bits_of(absmax))) {
    memset(packed, zero << 4 | zero, static_cast<size_t>((count + 1) / 2));
    return;
  }
  int64_t done = 0;
#if defined(__AVX512VBMI__)
  if (absmax >= kSmallestNormal) done = encode_groups(x, count, absmax, book, packed);
#endif
  static_assert(kChunk % kLanes == 0);
  float s[kChunk] = {};
  uint8_t codes[kChunk];
  for (int64_t i = done; i < count; i += kChunk) {
    const int64_t part = smaller(kChunk, count - i);
    scale_block(x + i, part, absmax, s);
    encode_nibbles(s, part, book, codes);
    if (part & 1) codes[part] = zero;  // only the last part of a tensor is odd, and then shorter than the chunk
    pack_nibbles(codes, (part + 1) / 2, packed + i / 2);
  }
}

// Encodes `count` elements from a block's first on.
inline void encode_blocks_4bit(const float* x, int64_t count, const Quantize4bit& a, float* absmax, uint8_t* packed) {
  int64_t i = 0;
#if defined(__AVX512VBMI__)
  i = encode_small_blocks(x, count, a.blocksize, *a.book, a.tensor_scale, absmax, packed);
#endif
  for (; i < count; i += a.blocksize) {
    const int64_t part = smaller(a.blocksize, count - i);
    float& scale = absmax[i / a.blocksize];
    scale = stored_scale(absmax_bits(x + i, part), *a.book, a.tensor_scale);
    encode_block_4bit(x + i, part, scale, *a.book, packed + i / 2);
  }
}

// max |x| of a row, elements at or above the threshold left out, as a bit pattern. All bits of NaN are above those of any
// threshold, but NaN is not an outlier, so it is asked for by itself.
inline uint32_t counted_absmax_bits(const float* x, int64_t count, float threshold) {
  if (threshold == 0.0f) return absmax_bits(x, count);
  const int32_t limit = static_cast<int32_t>(bits_of(threshold));
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(x[i]) & kMagnitude);
    const bool counts = magnitude < limit || magnitude > static_cast<int32_t>(kInfinity);
    const int32_t counted = counts ? magnitude : 0;
    largest = largest > counted ? largest : counted;
  }
  return static_cast<uint32_t>(largest);
}

// Nearest integer, ties to even, of |y| <= 127: the sum's last bit is worth 1, so the addition rounds.
inline int8_t round_to_int8(float y) {
  constexpr float kShift = 0x1.8p23f;
  const float capped = y > 127.0f ? 127.0f : y;
  const float bounded = capped < -127.0f ? -127.0f : capped;
  return static_cast<int8_t>(static_cast<int32_t>(bounded + kShift - kShift));
}

inline void encode_row(const float* x, int64_t count, float absmax, const uint8_t* outliers, int8_t* __restrict q) {
  const float scale = 127.0f / absmax;
  if (bits_of(scale) == kInfinity) {
    for (int64_t i = 0; i < count; ++i) {
      const float kept = outliers[i] ? 0.0f : x[i];
      q[i] = round_to_int8(kept / absmax * 127.0f);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float kept = outliers[i] ? 0.0f : x[i];
    q[i] = round_to_int8(kept * scale);
  }
}

void quantize_blockwise(const QuantizeBlockwise& a, int64_t first, int64_t last) {
  float buffer[kMaxBlocksize];
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * a.blocksize;
    const int64_t count = block_length(block, a.blocksize, a.numel);
    const float* x = load(a.A, a.dtype, begin, count, buffer);
    a.absmax[block] = encode_block(x, count, absmax_bits(x, count), *a.book, a.codes + begin);
  }
}

void dequantize_blockwise(const DequantizeBlockwise& a, int64_t first, int64_t last) {
  float buffer[kMaxBlocksize];
#if defined(__AVX512VBMI__)
  const int64_t start = first * a.blocksize;
  const bool streamed = a.dtype == Float::f32 && is_streamed(static_cast<float*>(a.out) + start, a.numel * 4);
#endif
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * a.blocksize;
    const int64_t count = block_length(block, a.blocksize, a.numel);
    float* out = destination(a.out, a.dtype, begin, buffer);
#if defined(__AVX512VBMI__)
    if (streamed) {
      decode_block_by<true>(a.codes + begin, count, *a.table, a.absmax[block], out);
      continue;
    }
#endif
    decode_block(a.codes + begin, count, *a.table, a.absmax[block], out);
    store(out, count, a.out, a.dtype, begin);
  }
#if defined(__AVX512VBMI__)
  if (streamed) _mm_sfence();
#endif
}

// Blocks taken at a time: enough of small ones to fill several vectors.
inline int64_t blocks_at_once(int64_t blocksize) { return blocksize < kMaxBlocksize ? kMaxBlocksize / blocksize : 1; }

void find_absmax(const Quantize4bit& a, int64_t first, int64_t last) {
  float buffer[kMaxBlocksize];
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * a.blocksize;
    const int64_t count = block_length(block, a.blocksize, a.numel);
    a.absmax[block] = absmax_value(absmax_bits(load(a.A, a.dtype, begin, count, buffer), count));
  }
}

void quantize_4bit(const Quantize4bit& a, int64_t first, int64_t last) {
  float buffer[kMaxBlocksize];
  const int64_t step = blocks_at_once(a.blocksize);
  for (int64_t block = first; block < last; block += step) {
    const int64_t begin = block * a.blocksize;
    const int64_t count = smaller(smaller(step, last - block) * a.blocksize, a.numel - begin);
    const float* x = load(a.A, a.dtype, begin, count, buffer);
    encode_blocks_4bit(x, count, a, a.absmax + block, a.packed + begin / 2);
  }
}

#if defined(__AVX512VBMI__)
template <Float kOut>
int64_t decode_groups_to(const Dequantize4bit& a, int64_t first, int64_t last) {
  constexpr int64_t kSize = kOut == Float::f32 ? 4 : 2;
  if (!is_streamed(static_cast<char*>(a.out) + first * a.blocksize * kSize, a.numel * kSize)) {
    return decode_groups<kOut, false>(a.packed, a.absmax, *a.book, a.blocksize, a.numel, a.out, first, last);
  }
  const int64_t next = decode_groups<kOut, true>(a.packed, a.absmax, *a.book, a.blocksize, a.numel, a.out, first, last);
  _mm_sfence();
  return next;
}
#endif

void dequantize_4bit(const Dequantize4bit& a, int64_t first, int64_t last) {
  float buffer[kMaxBlocksize];
#if defined(__AVX512VBMI__)
  first = a.dtype == Float::f32    ? decode_groups_to<Float::f32>(a, first, last)
          : a.dtype == Float::bf16 ? decode_groups_to<Float::bf16>(a, first, last)
                                   : decode_groups_to<Float::f16>(a, first, last);
#endif
  const int64_t step = blocks_at_once(a.blocksize);
  for (int64_t block = first; block < last; block += step) {
    const int64_t begin = block * a.blocksize;
    const int64_t count = smaller(smaller(step, last - block) * a.blocksize, a.numel - begin);
    float* out = destination(a.out, a.dtype, begin, buffer);
    decode_4bit(a.packed, a.absmax, *a.book, a.blocksize, begin, count, out);
    store(out, count, a.out, a.dtype, begin);
  }
}

void find_outlier_columns(const QuantizeInt8Rowwise& a, int64_t first, int64_t last) {
  float buffer[kMaxBlocksize];
  for (int64_t k = first; k < last; k += kMaxBlocksize) {
    const int64_t count = smaller(kMaxBlocksize, last - k);
    uint8_t* __restrict outliers = a.outliers_K + k;
    memset(outliers, 0, static_cast<size_t>(count));
    if (a.threshold == 0.0f) continue;
    for (int64_t t = 0; t < a.T; ++t) {
      const float* x = load(a.A_TK, a.dtype, t * a.K + k, count, buffer);
      for (int64_t i = 0; i < count; ++i) outliers[i] |= __builtin_fabsf(x[i]) >= a.threshold;
    }
  }
}

void quantize_int8_rowwise(const QuantizeInt8Rowwise& a, int64_t first, int64_t last) {
  float buffer[kMaxBlocksize];
  for (int64_t t = first; t < last; ++t) {
    uint32_t bits = 0;
    for (int64_t k = 0; k < a.K; k += kMaxBlocksize) {
      const int64_t count = smaller(kMaxBlocksize, a.K - k);
      const uint32_t part = counted_absmax_bits(load(a.A_TK, a.dtype, t * a.K + k, count, buffer), count, a.threshold);
      bits = bits > part ? bits : part;
    }
    a.absmax_T[t] = absmax_value(bits);
    if (!is_scalable(bits)) {
      if (a.K > 0) memset(a.q_TK + t * a.K, 0, static_cast<size_t>(a.K));  // without columns there is no memory either
      continue;
    }
    for (int64_t k = 0; k < a.K; k += kMaxBlocksize) {
      const int64_t count = smaller(kMaxBlocksize, a.K - k);
      const float* x = load(a.A_TK, a.dtype, t * a.K + k, count, buffer);
      encode_row(x, count, from_bits(bits), a.outliers_K + k, a.q_TK + t * a.K + k);
    }
  }
}

}  // namespace

extern const QuantizeKernels quantize_kernels;
const QuantizeKernels quantize_kernels = {
    quantize_blockwise, dequantize_blockwise, find_absmax,           quantize_4bit,
    dequantize_4bit,    find_outlier_columns, quantize_int8_rowwise,
};

}  // namespace q_cpu::Q_CPU_LEVEL
