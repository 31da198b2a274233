// Writing to the paged cache, and copying its blocks.

#include "kv_cache.h"

#include "blocks.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr float kInt8Peak = 127.0f;
constexpr float kE4m3Peak = 448.0f;

// x relative to its absmax, times peak: by the rounded quotient of the two, or in two steps where that overflows.
inline void scale_codes(const float* x, int64_t count, float absmax, float peak, float* __restrict scaled) {
  const float factor = peak / absmax;
  const bool overflows = bits_of(factor) == kInfinity;
  for (int64_t i = 0; i < count; ++i) {
    const float value = overflows ? x[i] / absmax * peak : x[i] * factor;
    const float capped = value > peak ? peak : value;
    scaled[i] = capped < -peak ? -peak : capped;
  }
}

// Nearest integer, ties to even: the sum's last bit is worth 1, so the addition rounds.
inline void encode_int8(const float* scaled, int64_t count, uint8_t* __restrict codes) {
  constexpr float kShift = 0x1.8p23f;
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(static_cast<int32_t>(scaled[i] + kShift - kShift));
}

// Nearest e4m3 of |scaled| <= 448, ties to even.
inline void encode_e4m3(const float* scaled, int64_t count, uint8_t* __restrict codes) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(scaled[i]);
    const uint32_t magnitude = bits & kMagnitude;
    // From 2^-6 on: move the exponent's bias, and round the 20 bits that go; a carry into the exponent is right.
    const uint32_t normal = (magnitude - (120u << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
    // Below: adding 2^14 leaves a subnormal's unit, 2^-9, as the sum's last bit, so the addition rounds.
    const uint32_t subnormal = bits_of(from_bits(magnitude) + 0x1p14f) - bits_of(0x1p14f);
    codes[i] = static_cast<uint8_t>((bits >> 24 & 0x80u) | (magnitude < 0x3c800000u ? subnormal : normal));
  }
}

inline void encode_head(const void* from, Float dtype, int64_t first, int64_t D, CacheFormat format, uint8_t* codes, float* scale) {
  float buffer[kChunk], scaled[kChunk];
  uint32_t bits = 0;
  for (int64_t d = 0; d < D; d += kChunk) {
    const int64_t count = smaller(kChunk, D - d);
    const uint32_t part = absmax_bits(load(from, dtype, first + d, count, buffer), count);
    bits = bits > part ? bits : part;
  }
  *scale = absmax_value(bits);
  if (!is_scalable(bits)) {
    if (D > 0) memset(codes, 0, static_cast<size_t>(D));
    return;
  }
  for (int64_t d = 0; d < D; d += kChunk) {
    const int64_t count = smaller(kChunk, D - d);
    const float* x = load(from, dtype, first + d, count, buffer);
    scale_codes(x, count, from_bits(bits), format == CacheFormat::int8 ? kInt8Peak : kE4m3Peak, scaled);
    format == CacheFormat::int8 ? encode_int8(scaled, count, codes + d) : encode_e4m3(scaled, count, codes + d);
  }
}

inline void write_token(const WriteKv& a, const WriteSide& side, int64_t t) {
  const int64_t block = a.slots_T[t] / a.S, offset = a.slots_T[t] % a.S;
  for (int64_t g = 0; g < a.G; ++g) {
    const int64_t from = t * side.token_stride + g * side.head_stride;
    const int64_t slot = (block * a.G + g) * a.S + offset;
    if (a.format != CacheFormat::dense) {
      encode_head(side.from_TGD, a.dtype, from, a.D, a.format, static_cast<uint8_t*>(side.cache_BGSD) + slot * a.D,
                  side.scale_BGS + slot);
      continue;
    }
    const int64_t element = a.dtype == Float::f32 ? 4 : 2;
    if (a.D > 0) {
      memcpy(static_cast<char*>(side.cache_BGSD) + slot * a.D * element, static_cast<const char*>(side.from_TGD) + from * element,
             static_cast<size_t>(a.D * element));
    }
  }
}

}  // namespace

void write_kv(const WriteKv& a, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; ++t) {
    if (a.slots_T[t] < 0) continue;
    write_token(a, a.k, t);
    write_token(a, a.v, t);
  }
}

void copy_blocks(const CopyBlocks& a, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    memcpy(a.dst + a.pairs[2 * i + 1] * a.block_bytes, a.src + a.pairs[2 * i] * a.block_bytes, static_cast<size_t>(a.block_bytes));
  }
}

}  // namespace q_cpu::Q_CPU_LEVEL
