// Matrix products with dense, 4-bit and int8 weights.
//
// An output element is summed over k in an order that depends on K and on the way taken alone, and the way on K and the number of
// tokens: with 4-bit weights and AVX-512 a few stream the codes through registers (four_bit_stream.h), in all other cases they meet
// the weight in panels (panels.h). Which rows a thread has makes no difference, so the bits are the same on any number of threads;
// and within one way, a token's don't depend on what else is in the batch.

#include "gemm.h"

#include "four_bit_panel.h"
#include "four_bit_stream.h"
#include "panels.h"
#include "vector.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int kTile = 4;  // tokens and rows of a register tile of integers

// Integer dot products of a tile, exact in any order.
template <int Tokens>
inline void dot_tile(const int8_t* const (&a)[kTile], const int8_t* const (&b)[kTile], int64_t K, int32_t (*sums)[kTile]) {
  Integers tile[Tokens][kTile] = {};
  int64_t k = 0;
  for (; k + kWidened <= K; k += kWidened) {
    Widened rows[kTile];
    for (int r = 0; r < kTile; ++r) rows[r] = widen(b[r] + k);
    for (int t = 0; t < Tokens; ++t) {
      const Widened token = widen(a[t] + k);
      for (int r = 0; r < kTile; ++r) tile[t][r] = dot_add(token, rows[r], tile[t][r]);
    }
  }
  if (k < K) {
    Widened rows[kTile];
    for (int r = 0; r < kTile; ++r) rows[r] = widen_part(b[r] + k, K - k);
    for (int t = 0; t < Tokens; ++t) {
      const Widened token = widen_part(a[t] + k, K - k);
      for (int r = 0; r < kTile; ++r) tile[t][r] = dot_add(token, rows[r], tile[t][r]);
    }
  }
  for (int t = 0; t < Tokens; ++t)
    for (int r = 0; r < kTile; ++r) sums[t][r] = sum_integers(tile[t][r]);
}

inline void dot_tokens(int64_t tokens, const int8_t* const (&a)[kTile], const int8_t* const (&b)[kTile], int64_t K,
                       int32_t (*sums)[kTile]) {
  switch (tokens) {
    case 1:
      return dot_tile<1>(a, b, K, sums);
    case 2:
      return dot_tile<2>(a, b, K, sums);
    case 3:
      return dot_tile<3>(a, b, K, sums);
    default:
      return dot_tile<kTile>(a, b, K, sums);
  }
}

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
  typedef typename PackedAs<X>::Number Number;
  typedef Products<Number, Number> P;
  multiply_panels<P, X>(a, first, last, FourBitRows<P>{w});
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

void int8_gemm(const Int8Gemm& a, int64_t first, int64_t last) {
  constexpr float kInverse = 1.0f / 16129.0f;
  for (int64_t row = first; row < last; row += kTile) {
    const int64_t rows = smaller(kTile, last - row);
    const int8_t* b[kTile];
    for (int r = 0; r < kTile; ++r) b[r] = a.b_NK + (row + smaller(r, rows - 1)) * a.K;
    for (int64_t token = 0; token < a.T; token += kTile) {
      const int64_t tokens = smaller(kTile, a.T - token);
      const int8_t* x[kTile];
      for (int t = 0; t < kTile; ++t) x[t] = a.a_TK + (token + smaller(t, tokens - 1)) * a.K;
      int32_t sums[kTile][kTile];
      dot_tokens(tokens, x, b, a.K, sums);
      for (int64_t t = 0; t < tokens; ++t) {
        float out[kTile];
        for (int64_t r = 0; r < rows; ++r) {
          const float scale = a.a_scale_T[token + t] * a.b_scale_N[row + r] * kInverse;
          const float value = static_cast<float>(sums[t][r]) * scale;
          out[r] = a.bias_N ? value + a.bias_N[row + r] : value;
        }
        store(out, rows, a.out_TN, a.dtype, (token + t) * a.N + row);
      }
    }
  }
}

// The rows of a dense weight for multiply_panels, where they lie; but for a last tile of fewer rows, which is copied.
template <class P>
struct DenseRows {
  static constexpr bool kInPlace = true;

  const typename P::W* w_NK;
  int64_t K;

  RowPanel<P> operator()(int64_t row, int64_t rows, int64_t k, int64_t width, typename P::W* panel) const {
    const typename P::W* begin = w_NK + row * K + k;
    if (rows == kTileRows) return {begin, {K, P::kStep}, kTileRows * K};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < width; i += P::kStep) {
        const int64_t count = smaller(P::kStep, width - i);
        typename P::W* to = panel + r * kRowStrides<P>.line + i / P::kStep * kRowStrides<P>.step;
        memcpy(to, begin + r * K + i, static_cast<size_t>(count) * sizeof(typename P::W));
      }
    }
    return {panel, kRowStrides<P>, 0};
  }
};

template <class X>
inline void multiply_dense(const Gemm& a, int64_t first, int64_t last) {
  typedef Products<typename PackedAs<X>::Number, X> P;
  const Product product{a.x_TK, a.bias_N, a.T, a.N, a.K, a.out_TN, a.dtype};
  multiply_panels<P, X>(product, first, last, DenseRows<P>{static_cast<const X*>(a.w_NK), a.K});
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
const GemmKernels gemm_kernels = {gemm_4bit, int8_gemm, gemm};

}  // namespace q_cpu::Q_CPU_LEVEL
