// Matrix products of floats with int8 weights that have one scale a row.
//
// Products are in float32, of pairs of bfloat16 where activations are and the level multiplies those: int8 is exact in bfloat16.
// Few tokens: one weight row at a time, read at the speed of memory. Many: panels of weights for register tiles. The two sum in
// different orders, so a token's last bits depend on whether its call has more than kFewTokens; within each they depend on nothing.

#include "int8.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "ahead.h"
#include "word_tile.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int64_t kRowBlock = 32;       // rows whose outputs are written together
constexpr int64_t kSumFeatures = 2048;  // summed apart, however many tokens there are
constexpr int64_t kPrefetchBytes = 6144;
constexpr int64_t kRowsAhead = 3;  // to fetch, where rows are read in parts
#if defined(__AVX512F__)
constexpr int kChains = 4;  // sums a token, so that additions needn't wait for each other
#else
constexpr int kChains = 2;
#endif

inline Vector to_floats(const int8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector>(
      _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#elif defined(__SSE2__)
  int32_t four;
  memcpy(&four, from, sizeof four);
  const __m128i bytes = _mm_cvtsi32_si128(four);
  const __m128i pairs = _mm_unpacklo_epi8(bytes, bytes);
  return reinterpret_cast<Vector>(_mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(pairs, pairs), 24)));
#else
  return Vector{static_cast<float>(from[0]), static_cast<float>(from[1]), static_cast<float>(from[2]), static_cast<float>(from[3])};
#endif
}

inline void write_outputs(const GemmInt8Weight& a, int64_t token, int64_t row, int64_t rows, const float* sums) {
  float out[kPackedRows];
  for (int64_t r = 0; r < rows; ++r) out[r] = sums[r] * (a.w_scale_N[row + r] / 127.0f);
  if (a.bias_N) {
    for (int64_t r = 0; r < rows; ++r) out[r] += a.bias_N[row + r];
  }
  store(out, rows, a.out_TN, a.out_dtype, token * a.N + row);
}

// Products in float32.
struct FloatDots {
  typedef float Sum;
  typedef Vector Sums;
  typedef float Activation;
  typedef Vector Weights;
  static constexpr int64_t kStep = kLanes;  // features of a vector along a row
  static constexpr int64_t kWordValues = 1;

  static Weights weights(const int8_t* w) { return to_floats(w); }
  static Sums dot(Sums sums, Weights w, const float* x) { return multiply_add(load_vector(x), w, sums); }
  static Sums dot(Sums sums, Weights w, const float* x, int64_t count) { return multiply_add(load_part(x, count), w, sums); }
  static Sums add(Sums sums, Words rows, Words token) {
    return multiply_add(reinterpret_cast<Vector>(rows), reinterpret_cast<Vector>(token), sums);
  }

  // Activations from element `first` on; not in place, they are brought to float32 in the buffer.
  static bool in_place(const GemmInt8Weight& a) { return a.dtype == Float::f32; }
  static const float* activations(const GemmInt8Weight& a, int64_t first, int64_t count, float* buffer) {
    return load(a.x_TK, a.dtype, first, count, buffer);
  }

  static void weight_words(const int8_t* w, int64_t width, uint32_t* words) {
    int64_t k = 0;
    for (; k + kLanes <= width; k += kLanes) store_words(reinterpret_cast<Words>(to_floats(w + k)), words + k);
    for (; k < width; ++k) words[k] = bits_of(static_cast<float>(w[k]));
  }
};

#if defined(__AVX512BF16__)

// Products of pairs of bfloat16.
struct Bf16Dots {
  typedef float Sum;
  typedef Vector Sums;
  typedef uint16_t Activation;
  typedef __m512bh Weights;
  static constexpr int64_t kStep = 2 * kLanes;
  static constexpr int64_t kWordValues = 2;

  static Weights weights(const int8_t* w) {
    return _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(to_floats(w + kLanes)), reinterpret_cast<__m512>(to_floats(w)));
  }
  static Sums dot(Sums sums, Weights w, __m512i x) {
    return reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), w, reinterpret_cast<__m512bh>(x)));
  }
  static Sums dot(Sums sums, Weights w, const uint16_t* x) { return dot(sums, w, _mm512_loadu_si512(x)); }
  static Sums dot(Sums sums, Weights w, const uint16_t* x, int64_t count) {
    return dot(sums, w, _mm512_maskz_loadu_epi16(~uint32_t{0} >> (kStep - count), x));
  }
  static Sums add(Sums sums, Words rows, Words token) {
    return dot(sums, reinterpret_cast<__m512bh>(rows), reinterpret_cast<__m512i>(token));
  }

  static bool in_place(const GemmInt8Weight&) { return true; }
  static const uint16_t* activations(const GemmInt8Weight& a, int64_t first, int64_t, uint16_t*) {
    return static_cast<const uint16_t*>(a.x_TK) + first;
  }

  static void weight_words(const int8_t* w, int64_t width, uint32_t* words) {
    int64_t k = 0;
    for (; k + kStep <= width; k += kStep) {
      const Weights pairs = weights(w + k);
      memcpy(words + k / 2, &pairs, sizeof pairs);
    }
    if (k == width) return;
    int8_t padded[kStep] = {};
    memcpy(padded, w + k, static_cast<size_t>(width - k));
    const Weights pairs = weights(padded);
    memcpy(words + k / 2, &pairs, static_cast<size_t>((width - k + 1) / 2) * sizeof(uint32_t));
  }
};

#endif

// Adds the products of `width` features, at most kSumFeatures, of one weight row to the sums of Tokens tokens.
template <class Dots, int Tokens>
inline void dot_part(const typename Dots::Activation* const (&x)[Tokens], int64_t first, const int8_t* w, int64_t width,
                     int64_t ahead, Vector* sums) {
  constexpr int64_t kStep = Dots::kStep;
  Vector chains[Tokens][kChains] = {};
  int64_t k = 0;
  for (; k + kChains * kStep <= width; k += kChains * kStep) {
#pragma GCC unroll 2
    for (int64_t line = 0; line < kChains * kStep; line += kLineBytes) __builtin_prefetch(w + k + ahead + line);
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      const auto weights = Dots::weights(w + k + i * kStep);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) chains[t][i] = Dots::dot(chains[t][i], weights, x[t] + first + k + i * kStep);
    }
  }
  for (; k < width; k += kStep) {
    const int64_t count = smaller(kStep, width - k);
    int8_t padded[kStep] = {};
    memcpy(padded, w + k, static_cast<size_t>(count));
    const auto weights = Dots::weights(padded);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) chains[t][0] = Dots::dot(chains[t][0], weights, x[t] + first + k, count);
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
    for (int i = 1; i < kChains; ++i) chains[t][0] += chains[t][i];
    sums[t] += chains[t][0];
  }
}

// Activations of all tokens stay in the first cache: of as many features at a time as that holds, for kRowBlock rows.
template <class Dots, int Tokens>
void few_tokens(const GemmInt8Weight& a, int64_t first, int64_t last) {
  typedef typename Dots::Activation Activation;
  constexpr int64_t kAtOnce = 4 * sizeof(float) / sizeof(Activation) / Tokens * kSumFeatures;
  alignas(64) Activation buffer[Tokens * kAtOnce];
  alignas(64) Vector sums[kRowBlock][Tokens];
  const int64_t ahead = a.K > kAtOnce ? kRowsAhead * a.K : kPrefetchBytes;
  for (int64_t block = first; block < last; block += kRowBlock) {
    const int64_t rows = smaller(kRowBlock, last - block);
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < a.K; k += kAtOnce) {
      const int64_t width = smaller(kAtOnce, a.K - k);
      const Activation* x[Tokens];
      for (int t = 0; t < Tokens; ++t) x[t] = Dots::activations(a, t * a.K + k, width, buffer + t * kAtOnce);
      for (int64_t r = 0; r < rows; ++r) {
        const int8_t* w = a.w_NK + (block + r) * a.K + k;
        look_up_pages(w + 4 * ahead, width);
        for (int64_t i = 0; i < width; i += kSumFeatures)
          dot_part<Dots, Tokens>(x, i, w + i, smaller(kSumFeatures, width - i), ahead, sums[r]);
      }
    }
    for (int t = 0; t < Tokens; ++t) {
      float totals[kRowBlock];
      for (int64_t r = 0; r < rows; ++r) totals[r] = sum_across(sums[r][t]);
      write_outputs(a, t, block, rows, totals);
    }
  }
}

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
    typedef typename Dots::Activation Activation;
    constexpr int64_t kSize = sizeof(Activation);
    if (Dots::in_place(a) && width % kWordValues == 0)
      return {static_cast<const char*>(a.x_TK) + (token * a.K + k) * kSize, a.K * kSize};
    Activation values[kPackedWords * kWordValues];
    for (int64_t t = 0; t < tokens; ++t) {
      uint32_t* words = buffer + t * kPackedWords;
      words[(width - 1) / kWordValues] = 0;
      memcpy(words, Dots::activations(a, (token + t) * a.K + k, width, values), static_cast<size_t>(width * kSize));
    }
    return {reinterpret_cast<const char*>(buffer), kPackedWords * static_cast<int64_t>(sizeof(uint32_t))};
  }

  template <int Tokens>
  void add(TokenWords x, int64_t, int64_t, int64_t width, int64_t, const uint32_t* panel, Ahead& ahead,
           Sum (*sums)[kPackedRows]) const {
    add_products<Dots, Tokens>(x, panel, (width + kWordValues - 1) / kWordValues, ahead, sums);
  }

  void write(int64_t token, int64_t row, int64_t rows, const Sum* sums) const { write_outputs(a, token, row, rows, sums); }
};

template <class Dots>
void multiply(const GemmInt8Weight& a, int64_t first, int64_t last) {
  static_assert(kFewTokens == 4);
  switch (a.T) {
    case 1:
      return few_tokens<Dots, 1>(a, first, last);
    case 2:
      return few_tokens<Dots, 2>(a, first, last);
    case 3:
      return few_tokens<Dots, 3>(a, first, last);
    case 4:
      return few_tokens<Dots, 4>(a, first, last);
    default:
      WeightProduct<Dots> product{a};
      return multiply_panels(product, a.T, a.K, first, last);
  }
}

}  // namespace

void gemm_int8_weight(const GemmInt8Weight& a, int64_t first, int64_t last);
void gemm_int8_weight(const GemmInt8Weight& a, int64_t first, int64_t last) {
#if defined(__AVX512BF16__)
  if (a.dtype == Float::bf16) return multiply<Bf16Dots>(a, first, last);
#endif
  multiply<FloatDots>(a, first, last);
}

}  // namespace q_cpu::Q_CPU_LEVEL
