// Matrix products with dense and 4-bit weights.
//
// An output element is summed over k in an order that depends on K and on the way taken alone, and the way on the number of tokens:
// a few stream the weight through once, more share decoded panels. Which rows a thread has makes no difference, so the bits are the
// same on any number of threads; and within one way, a token's don't depend on what else is in the batch.

#include "gemm.h"

#include "four_bit_panel.h"
#include "four_bit_stream.h"
#include "panels.h"
#include "vector.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int kDenseRows = 4;    // rows that stream side by side
constexpr int kDenseTokens = 4;  // tokens that they meet at once

#if defined(__AVX512BF16__)

inline void stream_4bit(const Product& a, const FourBitWeight& w, int64_t first, int64_t last) {
  switch (a.dtype) {
    case Float::f32:
      return stream<StreamFloat, float>(a, w, first, last);
    case Float::bf16:
      return stream<StreamBf16, Bf16>(a, w, first, last);
    default:
      return stream<StreamFloat, F16>(a, w, first, last);
  }
}

#endif

template <class X>
inline void multiply_decoded(const Product& a, const FourBitWeight& w, int64_t first, int64_t last) {
  typedef Products<typename PackedAs<X>::Number> P;
  multiply_panels<P, X>(a, first, last, FillFourBit<P>{w});
}

void gemm_4bit(const Gemm4bit& a, int64_t first, int64_t last) {
  const Product product{a.x_TK, a.bias_N, a.T, a.N, a.K, a.out_TN, a.dtype};
  const FourBitWeight w{a.packed, a.absmax, a.book, a.blocksize, __builtin_ctzll(static_cast<uint64_t>(a.blocksize)), a.K};
#if defined(__AVX512BF16__)
  if (can_stream(product)) return stream_4bit(product, w, first, last);
#endif
  switch (a.dtype) {
    case Float::f32:
      return multiply_decoded<float>(product, w, first, last);
    case Float::bf16:
      return multiply_decoded<Bf16>(product, w, first, last);
    default:
      return multiply_decoded<F16>(product, w, first, last);
  }
}

// A few tokens: the weight streams through once, a few rows at a time, read where it lies.
template <class P, int Tokens>
inline void stream_dense(const Gemm& a, int64_t token, int64_t row, int64_t rows) {
  typedef typename P::Number X;
  const Strides strides{a.K, P::kStep};
  const X* x = static_cast<const X*>(a.x_TK) + token * a.K;
  const X* w = static_cast<const X*>(a.w_NK) + row * a.K;
  float sums[whole_sums(Tokens * kDenseRows)] = {};
  if (rows == kDenseRows) {
    multiply_tile<P, Tokens, kDenseRows>(x, strides, w, strides, a.K, sums);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      float column[whole_sums(Tokens)] = {};
      multiply_tile<P, Tokens, 1>(x, strides, w + r * a.K, strides, a.K, column);
      for (int t = 0; t < Tokens; ++t) sums[t * kDenseRows + r] = column[t];
    }
  }
  float bias_buffer[kDenseRows];
  const float* bias = a.bias_N ? load(a.bias_N, a.dtype, row, rows, bias_buffer) : nullptr;
  for (int t = 0; t < Tokens; ++t) {
    float* values = sums + t * kDenseRows;
    for (int64_t r = 0; bias && r < rows; ++r) values[r] += bias[r];
    store(values, rows, a.out_TN, a.dtype, (token + t) * a.N + row);
  }
}

template <class X>
inline void multiply_dense(const Gemm& a, int64_t first, int64_t last) {
  typedef Products<X> P;
  for (int64_t row = first; row < last; row += kDenseRows) {
    const int64_t rows = smaller(kDenseRows, last - row);
    for (int64_t token = 0; token < a.T; token += kDenseTokens) {
      switch (smaller(kDenseTokens, a.T - token)) {
        case 1:
          stream_dense<P, 1>(a, token, row, rows);
          break;
        case 2:
          stream_dense<P, 2>(a, token, row, rows);
          break;
        case 3:
          stream_dense<P, 3>(a, token, row, rows);
          break;
        default:
          stream_dense<P, kDenseTokens>(a, token, row, rows);
      }
    }
  }
}

void gemm(const Gemm& a, int64_t first, int64_t last) {
  switch (a.dtype) {
    case Float::f32:
      return multiply_dense<float>(a, first, last);
    case Float::bf16:
      return multiply_dense<Bf16>(a, first, last);
    default:
      return multiply_dense<F16>(a, first, last);
  }
}

}  // namespace

extern const GemmKernels gemm_kernels;
const GemmKernels gemm_kernels = {gemm_4bit, gemm};

}  // namespace q_cpu::Q_CPU_LEVEL
