// Matrix products of int8 rows with int8 rows. Sums are exact, so neither the order nor the kernel makes a difference.
//
// Few tokens: one weight row at a time, read at the speed of memory. Many: panels of weights for register tiles.

#include "int8.h"

#include "ahead.h"
#include "int8_dots.h"

namespace q_cpu::Q_CPU_LEVEL {

void gemm_int8_weight(const GemmInt8Weight& a, int64_t first, int64_t last);
void gemm_4bit_int8(const Gemm4bitInt8& a, int64_t first, int64_t last);
void sum_spans(const Gemm4bitInt8& a, int64_t first, int64_t last);

namespace {

constexpr int64_t kPrefetchBytes = 6144;
constexpr int64_t kPackedBytes = 1 << 16;
constexpr int64_t kRowBlock = 32;  // rows whose outputs are written together

// Writes `rows` (up to kPackedRows) outputs of a token from their sums.
inline void write_outputs(const Int8Gemm& a, int64_t token, int64_t row, int64_t rows, const int32_t* sums, int32_t bias) {
  constexpr float kInverse = 1.0f / 16129.0f;
  const float token_scale = a.a_scale_T[token];
  const float* scales = a.b_scale_N + row;
  float out[kPackedRows];
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t sum = static_cast<int32_t>(static_cast<uint32_t>(sums[r]) - static_cast<uint32_t>(bias));
    // 131,072 products of -128 with -128 are the one sum that wraps around, and no other sum is as low.
    const float exact = sum == INT32_MIN ? 0x1p31f : static_cast<float>(sum);
    out[r] = exact * (token_scale * scales[r] * kInverse);
  }
  if (a.bias_N) {
    for (int64_t r = 0; r < rows; ++r) out[r] += a.bias_N[row + r];
  }
  store(out, rows, a.out_TN, a.dtype, token * a.N + row);
}

// Where the activations lie: bytes from token to token, and from step to step along a row.
struct TokenBytes {
  const int8_t* first;
  int64_t line, step;
};

// Brings what all tokens have of a step side by side, if they fit: rows of a power of two would compete for the same lines of L1.
template <int Tokens>
inline TokenBytes pack_steps(const Int8Gemm& a, int8_t (&packed)[kPackedBytes]) {
  if (Tokens == 1 || a.K % kDotBytes != 0 || Tokens * a.K > kPackedBytes) return {a.a_TK, a.K, kDotBytes};
  int8_t* out = packed;
  for (int64_t k = 0; k < a.K; k += kDotBytes) {
    for (int t = 0; t < Tokens; ++t, out += kDotBytes) memcpy(out, a.a_TK + t * a.K + k, kDotBytes);
  }
  return {packed, kDotBytes, Tokens * kDotBytes};
}

// One row at a time: memory is read in order, which is as fast as it gets.
template <int Tokens>
inline void dot_row(const Int8Gemm& a, const TokenBytes& x, const int8_t* w, Integers (&sums)[Tokens]) {
  look_up_pages(w + kPagesAheadBytes, a.K);
  const int8_t* token = x.first;
  int64_t k = 0;
  for (; k + kDotBytes <= a.K; k += kDotBytes, token += x.step) {
    __builtin_prefetch(w + k + kPrefetchBytes);
    const DotBytes weights = biased(load_bytes(w + k));
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) sums[t] = dot_add(sums[t], weights, load_bytes(token + t * x.line));
  }
  if (k == a.K) return;
  const DotBytes weights = biased(load_bytes(w + k, a.K - k));
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) sums[t] = dot_add(sums[t], weights, load_bytes(a.a_TK + t * a.K + k, a.K - k));
}

template <int Tokens>
void few_tokens(const Int8Gemm& a, int64_t first, int64_t last) {
  alignas(64) int8_t packed[kPackedBytes];
  const TokenBytes x = pack_steps<Tokens>(a, packed);
  int32_t biases[Tokens];
  for (int t = 0; t < Tokens; ++t) biases[t] = bias_of(a.a_TK + t * a.K, a.K);
  for (int64_t block = first; block < last; block += kRowBlock) {
    const int64_t rows = smaller(kRowBlock, last - block);
    int32_t totals[Tokens][kRowBlock];
    for (int64_t r = 0; r < rows; ++r) {
      Integers sums[Tokens] = {};
      dot_row<Tokens>(a, x, a.b_NK + (block + r) * a.K, sums);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) totals[t][r] = sum_across(sums[t]);
    }
    for (int t = 0; t < Tokens; ++t) write_outputs(a, t, block, rows, totals[t], biases[t]);
  }
}

struct Int8Product {
  typedef int32_t Sum;
  static constexpr int64_t kWordValues = kWordBytes;
  static constexpr uint32_t kFlip = kBiasWord;
  static constexpr int64_t kRowBits = 8;

  const Int8Gemm& a;
  int64_t first_token;
  int32_t biases[kBlockTokens];

  void begin_tokens(int64_t token, int64_t tokens) {
    first_token = token;
    for (int64_t t = 0; t < tokens; ++t) biases[t] = bias_of(a.a_TK + (token + t) * a.K, a.K);
  }

  void begin_features(int64_t, int64_t, int64_t, int64_t) {}

  const char* row_at(int64_t row, int64_t k) const { return reinterpret_cast<const char*>(a.b_NK + row * a.K + k); }
  int64_t row_stride() const { return a.K; }

  const char* row_words(int64_t row, int64_t k, int64_t width, uint32_t* buffer) const {
    return int8_words(a.b_NK + row * a.K + k, width, buffer);
  }

  TokenWords token_words(int64_t token, int64_t tokens, int64_t k, int64_t width, uint32_t* buffer) const {
    return int8_tokens(a.a_TK + token * a.K + k, a.K, tokens, width, buffer);
  }

  template <int Tokens>
  void add(TokenWords x, int64_t, int64_t, int64_t width, int64_t, const uint32_t* panel, Ahead& ahead,
           Sum (*sums)[kPackedRows]) const {
    add_products<Int8Dots, Tokens>(x, panel, (width + kWordValues - 1) / kWordValues, ahead, sums);
  }

  void write(int64_t token, int64_t row, int64_t rows, const Sum* sums) const {
    write_outputs(a, token, row, rows, sums, biases[token - first_token]);
  }
};

void int8_gemm(const Int8Gemm& a, int64_t first, int64_t last) {
  switch (a.T) {
    case 1:
      return few_tokens<1>(a, first, last);
    case 2:
      return few_tokens<2>(a, first, last);
    case 3:
      return few_tokens<3>(a, first, last);
    case 4:
      return few_tokens<4>(a, first, last);
#if defined(__AVX512VNNI__)
    case 5:
      return few_tokens<5>(a, first, last);
    case 6:
      return few_tokens<6>(a, first, last);
#endif
    default:
      Int8Product product{a, 0, {}};
      return multiply_panels(product, a.T, a.K, first, last);
  }
}

}  // namespace

extern const Int8Kernels int8_kernels;
const Int8Kernels int8_kernels = {int8_gemm, gemm_int8_weight, gemm_4bit_int8, sum_spans};

}  // namespace q_cpu::Q_CPU_LEVEL
