// Matrix products of floats with int8 weights that have one scale a row.
//
// Few tokens: float32 throughout, weights read once, at the speed of memory. Many: panels of weights for register tiles, in bfloat16
// where activations are and the level multiplies such pairs (int8 is exact in bfloat16, and products are in float32), else in
// float32. The two sum in different orders, so a token's last bits depend on whether its call has more than kFewTokens; within each
// they depend on nothing.

#include "int8.h"

#include "word_tile.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int kRowsAtOnce = 4;
constexpr int64_t kRowBlock = 64;         // rows that share activations brought to float32
constexpr int64_t kBufferFloats = 4096;   // for those activations: 16 KB
constexpr int64_t kPrefetchBytes = 4096;

inline Vector to_floats(const int8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector>(
      _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#else
  return Vector{static_cast<float>(from[0]), static_cast<float>(from[1]), static_cast<float>(from[2]), static_cast<float>(from[3])};
#endif
}

// The first `count` values, zeros after them; reads no more than they are.
inline Vector to_floats(const int8_t* from, int64_t count) {
  int8_t padded[kLanes] = {};
  memcpy(padded, from, static_cast<size_t>(count));
  return to_floats(padded);
}

inline void write_outputs(const GemmInt8Weight& a, int64_t token, int64_t row, int64_t rows, const float* sums) {
  float out[kPackedRows];
  for (int64_t r = 0; r < rows; ++r) out[r] = sums[r] * (a.w_scale_N[row + r] / 127.0f);
  if (a.bias_N) {
    for (int64_t r = 0; r < rows; ++r) out[r] += a.bias_N[row + r];
  }
  store(out, rows, a.out_TN, a.dtype, token * a.N + row);
}

// Adds the products of `width` features to the sums of Tokens tokens and kRowsAtOnce rows; `next` is what to prefetch meanwhile.
template <int Tokens>
inline void dot_rows(const float* const (&x)[Tokens], const int8_t* const (&w)[kRowsAtOnce], int64_t width, const int8_t* next,
                     Vector (*sums)[Tokens]) {
  Vector tile[kRowsAtOnce][Tokens];
  for (int r = 0; r < kRowsAtOnce; ++r)
    for (int t = 0; t < Tokens; ++t) tile[r][t] = sums[r][t];
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    __builtin_prefetch(next + kRowsAtOnce * k);
    Vector tokens[Tokens];
    for (int t = 0; t < Tokens; ++t) tokens[t] = load_vector(x[t] + k);
#pragma GCC unroll 4
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const Vector row = to_floats(w[r] + k);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) tile[r][t] = multiply_add(tokens[t], row, tile[r][t]);
    }
  }
  if (k < width) {
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const Vector row = to_floats(w[r] + k, width - k);
      for (int t = 0; t < Tokens; ++t) tile[r][t] = multiply_add(load_part(x[t] + k, width - k), row, tile[r][t]);
    }
  }
  for (int r = 0; r < kRowsAtOnce; ++r)
    for (int t = 0; t < Tokens; ++t) sums[r][t] = tile[r][t];
}

template <int Tokens>
void few_tokens(const GemmInt8Weight& a, int64_t first, int64_t last) {
  constexpr int64_t kWidth = kBufferFloats / Tokens / kLanes * kLanes;
  alignas(64) float buffer[kBufferFloats];
  alignas(64) Vector sums[kRowBlock][Tokens];
  for (int64_t block = first; block < last; block += kRowBlock) {
    const int64_t rows = smaller(kRowBlock, last - block);
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < a.K; k += kWidth) {
      const int64_t width = smaller(kWidth, a.K - k);
      const int64_t ahead = kRowsAtOnce * a.K > kPrefetchBytes ? kRowsAtOnce * a.K : kPrefetchBytes;
      const float* x[Tokens];
      for (int t = 0; t < Tokens; ++t) x[t] = load(a.x_TK, a.dtype, t * a.K + k, width, buffer + t * kWidth);
      for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
        const int8_t* w[kRowsAtOnce];
        for (int i = 0; i < kRowsAtOnce; ++i) w[i] = a.w_NK + (block + smaller(r + i, rows - 1)) * a.K + k;
        dot_rows<Tokens>(x, w, width, w[0] + ahead, sums + r);
      }
    }
    for (int t = 0; t < Tokens; ++t) {
      float totals[kRowBlock];
      for (int64_t r = 0; r < rows; ++r) totals[r] = sum_lanes(sums[r][t]);
      write_outputs(a, t, block, rows, totals);
    }
  }
}

// Products in float32.
struct FloatDots {
  typedef float Sum;
  typedef Vector Sums;
  static constexpr int64_t kWordValues = 1;
  static constexpr uint32_t kFlip = 0;
  static Sums add(Sums sums, Words rows, Words token) {
    return multiply_add(reinterpret_cast<Vector>(rows), reinterpret_cast<Vector>(token), sums);
  }

  static void weight_words(const int8_t* w, int64_t width, uint32_t* words) {
    int64_t k = 0;
    for (; k + kLanes <= width; k += kLanes) store_words(reinterpret_cast<Words>(to_floats(w + k)), words + k);
    for (; k < width; ++k) words[k] = bits_of(static_cast<float>(w[k]));
  }

  static TokenWords token_words(const GemmInt8Weight& a, int64_t token, int64_t tokens, int64_t k, int64_t width, uint32_t* buffer) {
    const int64_t first = token * a.K + k;
    if (a.dtype == Float::f32) {
      return {static_cast<const char*>(a.x_TK) + first * 4, a.K * 4};
    }
    float floats[kPackedWords];
    for (int64_t t = 0; t < tokens; ++t) {
      memcpy(buffer + t * kPackedWords, load(a.x_TK, a.dtype, first + t * a.K, width, floats), static_cast<size_t>(width) * 4);
    }
    return {reinterpret_cast<const char*>(buffer), kPackedWords * 4};
  }
};

#if defined(__AVX512BF16__)

// Products of pairs of bfloat16.
struct Bf16Dots {
  typedef float Sum;
  typedef Vector Sums;
  static constexpr int64_t kWordValues = 2;
  static constexpr uint32_t kFlip = 0;
  static Sums add(Sums sums, Words rows, Words token) {
    return reinterpret_cast<Vector>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), reinterpret_cast<__m512bh>(rows), reinterpret_cast<__m512bh>(token)));
  }

  static void weight_words(const int8_t* w, int64_t width, uint32_t* words) {
    int64_t k = 0;
    for (; k + 2 * kLanes <= width; k += 2 * kLanes) store_pairs(w + k, words + k / 2);
    if (k == width) return;
    int8_t padded[2 * kLanes] = {};
    memcpy(padded, w + k, static_cast<size_t>(width - k));
    alignas(64) uint32_t pairs[kLanes];
    store_pairs(padded, pairs);
    memcpy(words + k / 2, pairs, static_cast<size_t>((width - k + 1) / 2) * sizeof(uint32_t));
  }

  static void store_pairs(const int8_t* w, uint32_t* words) {
    const __m512bh pairs =
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(to_floats(w + kLanes)), reinterpret_cast<__m512>(to_floats(w)));
    memcpy(words, &pairs, sizeof pairs);
  }

  static TokenWords token_words(const GemmInt8Weight& a, int64_t token, int64_t tokens, int64_t k, int64_t width, uint32_t* buffer) {
    const char* x = static_cast<const char*>(a.x_TK) + (token * a.K + k) * 2;
    if (width % 2 == 0) return {x, a.K * 2};
    for (int64_t t = 0; t < tokens; ++t) {
      buffer[t * kPackedWords + width / 2] = 0;
      memcpy(buffer + t * kPackedWords, x + t * a.K * 2, static_cast<size_t>(width) * 2);
    }
    return {reinterpret_cast<const char*>(buffer), kPackedWords * 4};
  }
};

#endif

template <class Dots>
struct WeightProduct {
  typedef float Sum;
  static constexpr int64_t kWordValues = Dots::kWordValues;
  static constexpr uint32_t kFlip = 0;
  static constexpr int64_t kRowBits = 8;

  const GemmInt8Weight& a;

  void begin_tokens(int64_t, int64_t) {}
  void begin_features(int64_t, int64_t, int64_t, int64_t) {}

  const char* row_at(int64_t row, int64_t k) const { return reinterpret_cast<const char*>(a.w_NK + row * a.K + k); }
  int64_t row_stride() const { return a.K; }

  const char* row_words(int64_t row, int64_t k, int64_t width, uint32_t* buffer) const {
    Dots::weight_words(a.w_NK + row * a.K + k, width, buffer);
    return reinterpret_cast<const char*>(buffer);
  }

  TokenWords token_words(int64_t token, int64_t tokens, int64_t k, int64_t width, uint32_t* buffer) const {
    return Dots::token_words(a, token, tokens, k, width, buffer);
  }

  template <int Tokens>
  void add(TokenWords x, int64_t, int64_t, int64_t width, int64_t, const uint32_t* panel, Ahead& ahead, Sum (*sums)[kPackedRows]) const {
    add_products<Dots, Tokens>(x, panel, (width + kWordValues - 1) / kWordValues, ahead, sums);
  }

  void write(int64_t token, int64_t row, int64_t rows, const Sum* sums) const { write_outputs(a, token, row, rows, sums); }
};

template <class Dots>
void many_tokens(const GemmInt8Weight& a, int64_t first, int64_t last) {
  WeightProduct<Dots> product{a};
  multiply_panels(product, a.T, a.K, first, last);
}

}  // namespace

void gemm_int8_weight(const GemmInt8Weight& a, int64_t first, int64_t last);
void gemm_int8_weight(const GemmInt8Weight& a, int64_t first, int64_t last) {
  static_assert(kFewTokens == 4);
  switch (a.T) {
    case 1:
      return few_tokens<1>(a, first, last);
    case 2:
      return few_tokens<2>(a, first, last);
    case 3:
      return few_tokens<3>(a, first, last);
    case 4:
      return few_tokens<4>(a, first, last);
  }
#if defined(__AVX512BF16__)
  if (a.dtype == Float::bf16) return many_tokens<Bf16Dots>(a, first, last);
#endif
  many_tokens<FloatDots>(a, first, last);
}

}  // namespace q_cpu::Q_CPU_LEVEL
