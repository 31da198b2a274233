// Matrix products of int8 rows with 4-bit weights, for gemm_4bit with activations="int8".
//
// The values of the code book are integers here (Int8Book), so the dot product of what shares a scale is an exact integer; it is
// scaled by the block's absmax and summed in float32. Few tokens, and blocks that straddle rows: one weight row at a time, decoded
// as it is read. Many tokens: panels of decoded weights for register tiles. The two sum in different orders, so a token's last bits
// depend on whether its call has more than kFewTokens; within each they depend on nothing.

#include "ahead.h"
#include "int8.h"
#include "int8_book.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int64_t kDecodedAtOnce = 1024;  // of a row, in the first cache
constexpr int64_t kPrefetchBytes = 4096;
constexpr int64_t kMaxSpans = kPackedWords * kWordBytes / kMinFourBitBlocksize;  // in a panel
constexpr int64_t kMaxRepeats = kPackedWords * kWordBytes / kMaxSpan;
constexpr int64_t kRowBlock = 16;  // rows whose outputs are written together

// Block sizes are powers of two, and a division by one that the compiler doesn't know costs as much as a block's products.
inline int log2_of(int64_t power_of_two) { return __builtin_ctzll(static_cast<uint64_t>(power_of_two)); }

inline void write_outputs(const Gemm4bitInt8& a, int64_t token, int64_t row, int64_t rows, const float* sums) {
  const float scale = a.x_absmax_T[token] / 127.0f * a.book->unit;
  float out[kPackedRows];
  for (int64_t r = 0; r < rows; ++r) out[r] = sums[r] * scale;
  if (a.bias_N) {
    for (int64_t r = 0; r < rows; ++r) out[r] += a.bias_N[row + r];
  }
  store(out, rows, a.out_TN, a.dtype, token * a.N + row);
}

// Adds the scaled dot product of `count` biased weights, which share a scale, to the sums of Tokens tokens.
template <int Tokens>
inline void add_block(const int8_t* x, int64_t x_stride, const int8_t* w, int64_t count, float scale, Vector (&sums)[Tokens]) {
  Integers dots[Tokens] = {};
  Integers biases[Tokens] = {};
  const DotBytes zeros = biased(DotBytes{});
  const auto add = [&](int t, DotBytes row, DotBytes token) {
    dots[t] = dot_add(dots[t], row, token);
    if (kBias) biases[t] = dot_add(biases[t], zeros, token);
  };
  int64_t k = 0;
  for (; k + kDotBytes <= count; k += kDotBytes) {
    const DotBytes row = load_bytes(w + k);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) add(t, row, load_bytes(x + t * x_stride + k));
  }
  if (k < count) {
    const DotBytes row = load_bytes(w + k, count - k);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) add(t, row, load_bytes(x + t * x_stride + k, count - k));
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t)
    sums[t] = multiply_add(__builtin_convertvector(dots[t] - biases[t], Vector), Vector{} + scale, sums[t]);
}

// Adds the products of the decoded weights first…first + width with Tokens tokens; each block, or what of it was decoded, has its
// scale. Not inlined: the compiler would run out of registers for addresses.
template <int Tokens>
__attribute__((noinline)) void add_blocks(const Gemm4bitInt8& a, const int8_t* x, int64_t first, const int8_t* w, int64_t width,
                                          Vector* sums) {
  const int shift = log2_of(a.blocksize);
  const int64_t blocksize = a.blocksize, x_stride = a.K;
  const float* scale = a.absmax + (first >> shift);
  Vector totals[Tokens];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) totals[t] = sums[t];
  const auto add = [&](int64_t i, int64_t count) { add_block<Tokens>(x + i, x_stride, w + i, count, *scale++, totals); };
  const int64_t begun = first & (blocksize - 1);
  int64_t i = 0;
  if (begun) add(0, i = smaller(blocksize - begun, width));
  if (blocksize == kDotBytes) {
    for (; i + kDotBytes <= width; i += kDotBytes) add(i, kDotBytes);
  } else {
    for (; i + blocksize <= width; i += blocksize) add(i, blocksize);
  }
  if (i < width) add(i, width - i);
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) sums[t] = totals[t];
}

#if defined(__AVX512F__)

// One weight row of whole blocks, each of whole vectors, and Tokens tokens: decoded in registers.
template <int Tokens>
__attribute__((noinline)) void multiply_whole_blocks(const Gemm4bitInt8& a, const BiasedBook& book, int64_t row, const int8_t* x,
                                                     Vector* sums) {
  const __m512i values = _mm512_load_si512(book.values), zeros = biased(DotBytes{});
  const int64_t K = a.K, blocksize = a.blocksize;
  const uint8_t* packed = a.packed + row * K / 2;
  const float* scale = a.absmax + ((row * K) >> log2_of(blocksize));
  look_up_pages(packed + kPagesAheadBytes, K / 2);
  Vector totals[Tokens] = {};
  for (int64_t k = 0; k < K; ++scale) {
    Integers dots[Tokens] = {}, biases[Tokens] = {};
    for (const int64_t end = k + blocksize; k < end; k += kDotBytes) {
      __builtin_prefetch(packed + k / 2 + kPrefetchBytes);
      const DotBytes w = decode_64(packed + k / 2, values);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        const DotBytes token = load_bytes(x + t * K + k);
        dots[t] = dot_add(dots[t], w, token);
        biases[t] = dot_add(biases[t], zeros, token);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t)
      totals[t] = multiply_add(__builtin_convertvector(dots[t] - biases[t], Vector), Vector{} + *scale, totals[t]);
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) sums[t] = totals[t];
}

#endif

// One weight row and a block of tokens.
inline void multiply_row(const Gemm4bitInt8& a, const BiasedBook& book, int64_t row, int64_t token, int64_t tokens, Vector* sums) {
  alignas(64) int8_t w[kDecodedAtOnce];
#if defined(__AVX512F__)
  if (a.blocksize % kDotBytes == 0 && a.K % a.blocksize == 0 && tokens <= kFewTokens) {
    const int8_t* x = a.x_TK + token * a.K;
    switch (tokens) {
      case 1:
        return multiply_whole_blocks<1>(a, book, row, x, sums);
      case 2:
        return multiply_whole_blocks<2>(a, book, row, x, sums);
      case 3:
        return multiply_whole_blocks<3>(a, book, row, x, sums);
      default:
        return multiply_whole_blocks<4>(a, book, row, x, sums);
    }
  }
#endif
  memset(sums, 0, static_cast<size_t>(tokens) * sizeof *sums);
  for (int64_t k = 0; k < a.K; k += kDecodedAtOnce) {
    const int64_t width = smaller(kDecodedAtOnce, a.K - k);
    const int64_t first = row * a.K + k;
    for (int64_t i = 0; i < width; i += 2 * kLineBytes) __builtin_prefetch(a.packed + (first + i) / 2 + kPrefetchBytes);
    decode_codes(a.packed, first, width, book, w);
    for (int64_t t = 0; t < tokens; t += 4) {
      const int8_t* x = a.x_TK + (token + t) * a.K + k;
      switch (tokens - t) {
        case 1:
          add_blocks<1>(a, x, first, w, width, sums + t);
          break;
        case 2:
          add_blocks<2>(a, x, first, w, width, sums + t);
          break;
        case 3:
          add_blocks<3>(a, x, first, w, width, sums + t);
          break;
        default:
          add_blocks<4>(a, x, first, w, width, sums + t);
      }
    }
  }
}

void multiply_rows(const Gemm4bitInt8& a, int64_t first, int64_t last) {
  const BiasedBook book(*a.book);
  alignas(64) Vector sums[kBlockTokens];
  float totals[kBlockTokens][kRowBlock];
  for (int64_t token = 0; token < a.T; token += kBlockTokens) {
    const int64_t tokens = smaller(kBlockTokens, a.T - token);
    for (int64_t block = first; block < last; block += kRowBlock) {
      const int64_t rows = smaller(kRowBlock, last - block);
      for (int64_t r = 0; r < rows; ++r) {
        multiply_row(a, book, block + r, token, tokens, sums);
        for (int64_t t = 0; t < tokens; ++t) totals[t][r] = sum_across(sums[t]);
      }
      for (int64_t t = 0; t < tokens; ++t) write_outputs(a, token + t, block, rows, totals[t]);
    }
  }
}

// Adds the scaled products of one span to the sums of Tokens tokens and kTileRows rows. `span_sums` are those of the tokens,
// `spans` apart. Not inlined, because the compiler would keep float sums of all spans in registers that the integer ones need.
template <int Tokens>
__attribute__((noinline)) void add_span(TokenWords x, const uint32_t* panel, int64_t words, const int32_t* span_sums, int64_t spans,
                                        const uint32_t* scales, Ahead& ahead, float (*sums)[kPackedRows]) {
  Integers tile[Tokens][kTileVectors];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
    const Integers start = Integers{} - kBias * span_sums[t * spans];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) tile[t][v] = start;
  }
  dot_words<Int8Dots, Tokens>(x, panel, words, ahead, tile);
#pragma GCC unroll 4
  for (int v = 0; v < kTileVectors; ++v) {
    const Vector scale = reinterpret_cast<Vector>(load_words(scales + v * kLanes));
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      float* sum = sums[t] + v * kLanes;
      const Vector total = multiply_add(__builtin_convertvector(tile[t][v], Vector), scale, load_vector(sum));
      memcpy(sum, &total, sizeof total);
    }
  }
}

struct Gemm4bitInt8Product {
  typedef float Sum;
  static constexpr int64_t kWordValues = kWordBytes;
  static constexpr uint32_t kFlip = 0;
  static constexpr int64_t kRowBits = 4;

  const Gemm4bitInt8& a;
  const BiasedBook book;
  alignas(64) uint32_t scales[kMaxSpans * kPackedRows];  // bits of the absmax of the panel's spans and rows

  void begin_tokens(int64_t, int64_t) {}

  const char* row_at(int64_t row, int64_t k) const { return reinterpret_cast<const char*>(a.packed + (row * a.K + k) / 2); }
  int64_t row_stride() const { return a.K / 2; }

  void begin_features(int64_t row, int64_t rows, int64_t k, int64_t width) {
    const int64_t spans = width >> log2_of(a.span);
    const int shift = log2_of(a.blocksize);
    for (int64_t strip = 0; strip < rows; strip += kLanes) {
      Rows at;
      uint32_t repeated[kLanes][kMaxRepeats];
      for (int r = 0; r < kLanes; ++r) {
        const float* absmax = a.absmax + (((row + smaller(strip + r, rows - 1)) * a.K + k) >> shift);
        at.at[r] = reinterpret_cast<const char*>(absmax);
        if (a.span == a.blocksize) continue;
        // Spans of one block, or of the two that a panel may touch.
        for (int64_t i = 0; i < spans; ++i)
          memcpy(&repeated[r][i], absmax + ((k + i * a.span) >> shift) - (k >> shift), sizeof(float));
        at.at[r] = reinterpret_cast<const char*>(repeated[r]);
      }
      pack_rows(at, spans, 0, scales + strip);
    }
  }

  const char* row_words(int64_t row, int64_t k, int64_t width, uint32_t* buffer) const {
    const int64_t first = row * a.K + k;
    if (kWordBytes == 4) {
      decode_codes(a.packed, first, width, book, reinterpret_cast<int8_t*>(buffer));
    } else {
      int8_t decoded[kPackedWords * kWordBytes];
      decode_codes(a.packed, first, width, book, decoded);
      to_words(decoded, width, buffer);
    }
    return reinterpret_cast<const char*>(buffer);
  }

  TokenWords token_words(int64_t token, int64_t tokens, int64_t k, int64_t width, uint32_t* buffer) const {
    return int8_tokens(a.x_TK + token * a.K + k, a.K, tokens, width, buffer);
  }

  template <int Tokens>
  void add(TokenWords x, int64_t token, int64_t k, int64_t width, int64_t row, const uint32_t* panel, Ahead& ahead,
           Sum (*sums)[kPackedRows]) const {
    const int64_t words = a.span / kWordBytes;
    const int64_t spans = a.K >> log2_of(a.span);
    for (int64_t i = 0; i < width >> log2_of(a.span); ++i) {
      const int32_t* span_sums = a.span_sums + token * spans + (k >> log2_of(a.span)) + i;
      add_span<Tokens>(x, panel, words, span_sums, spans, scales + i * kPackedRows + row, ahead, sums);
      x.first += words * static_cast<int64_t>(sizeof(uint32_t));
      panel += words * kPackedRows;
    }
  }

  void write(int64_t token, int64_t row, int64_t rows, const Sum* sums) const { write_outputs(a, token, row, rows, sums); }
};

}  // namespace

void sum_spans(const Gemm4bitInt8& a, int64_t first, int64_t last);
void sum_spans(const Gemm4bitInt8& a, int64_t first, int64_t last) {
  const int64_t spans = a.K / a.span;
  for (int64_t t = first; t < last; ++t) {
    for (int64_t i = 0; i < spans; ++i) {
      const int8_t* x = a.x_TK + t * a.K + i * a.span;
      int32_t sum = 0;
      for (int64_t k = 0; k < a.span; ++k) sum += x[k];
      a.span_sums[t * spans + i] = sum;
    }
  }
}

void gemm_4bit_int8(const Gemm4bitInt8& a, int64_t first, int64_t last);
void gemm_4bit_int8(const Gemm4bitInt8& a, int64_t first, int64_t last) {
  if (a.T <= kFewTokens || a.span_sums == nullptr) return multiply_rows(a, first, last);
  Gemm4bitInt8Product product{a, BiasedBook(*a.book), {}};
  multiply_panels(product, a.T, a.K, first, last);
}

}  // namespace q_cpu::Q_CPU_LEVEL
