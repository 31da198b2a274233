// Matrix products with dense and 4-bit weights.
//
// An output element is summed over k in an order that depends on K alone, or with 4-bit weights on K, the blocksize and the way
// taken: with AVX-512 a few tokens stream the codes through registers (four_bit_stream.h), in all other cases they meet the decoded
// weight in panels (panels.h). Dense weights are read in two ways that make the same sums (dense.h). Which rows a thread has makes
// no difference, so the bits are the same on any number of threads; and within one way, a token's don't depend on what else is in
// the batch.

#include "gemm.h"

#include "dense.h"
#include "four_bit_panel.h"
#include "four_bit_stream.h"
#include "panels.h"
#include "vector.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

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
  const Product product{a.x_TK, a.bias_N, a.T, a.N, a.K, a.out_TN, a.dtype, a.out_dtype};
  const FourBitWeight w{a.packed, a.absmax, a.book, a.blocksize, __builtin_ctzll(static_cast<uint64_t>(a.blocksize)), a.K};
#if defined(__AVX512BF16__)
  if (can_stream(product)) return stream_4bit(product, w, first, last);
  if (a.dtype == Float::bf16 && EvenOddRows::take(w)) {
    return multiply_panels<EvenOddRows::P, Bf16>(product, first, last, EvenOddRows{w});
  }
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

template <class X>
inline void multiply_dense(const Gemm& a, int64_t first, int64_t last) {
  typedef Products<typename PackedAs<X>::Number, X> P;
  const Product product{a.x_TK, a.bias_N, a.T, a.N, a.K, a.out_TN, a.dtype, a.out_dtype};
  const X* w_NK = static_cast<const X*>(a.w_NK);
#if defined(__AVX512F__)
  if (can_stream_dense<P>(product)) return stream_dense<P, X>(product, w_NK, first, last);
#endif
  multiply_panels<P, X>(product, first, last, DenseRows<P>{w_NK, a.K});
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
