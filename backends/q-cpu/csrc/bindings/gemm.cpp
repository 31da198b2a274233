#include "gemm.h"

#include "module.h"
#include "state.h"
#include "threads.h"

namespace q_cpu {

namespace {

// A bias of the output's dtype, or null.
const void* optional_bias(const TensorView& result, const char* op, py::handle bias, int64_t N) {
  if (bias.is_none()) return nullptr;
  return TensorView(bias, {op, "bias"}).of(result).sized(N).data<const void>();
}

void gemm(py::handle x, py::handle w, int64_t T, int64_t N, int64_t K, py::handle bias, py::handle out) {
  constexpr const char* op = "gemm";
  const TensorView result = TensorView(out, {op, "out"}).floating().sized(checked_product(op, T, N));
  const Gemm args{
      TensorView(x, {op, "x_TK"}).of(result).sized(checked_product(op, T, K)).data<const void>(),
      TensorView(w, {op, "w_NK"}).of(result).sized(checked_product(op, N, K)).data<const void>(),
      optional_bias(result, op, bias, N),
      T,
      N,
      K,
      result.data<void>(),
      result.dtype(),
      result.dtype(),
  };
  if (result.numel() == 0) return;
  const auto kernel = kernels().gemm->gemm;
  parallel_for(N, checked_product(op, T, K), [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

void gemm_4bit(py::handle x, py::handle packed, py::handle absmax, int64_t blocksize, const std::string& quant_type, int64_t T,
               int64_t N, int64_t K, py::handle bias, py::handle out) {
  constexpr const char* op = "gemm_4bit";
  const int64_t weights = checked_product(op, N, K);
  const int64_t blocks = count_blocks(op, weights, blocksize, kMinFourBitBlocksize);
  const TensorView result = TensorView(out, {op, "out"}).floating().sized(checked_product(op, T, N));
  const Gemm4bit args{
      TensorView(x, {op, "x_TK"}).of(result).sized(checked_product(op, T, K)).data<const void>(),
      TensorView(packed, {op, "packed"}).of(Scalar::u8).sized(weights / 2 + weights % 2).data<const uint8_t>(),
      TensorView(absmax, {op, "absmax"}).of(Scalar::f32).sized(blocks).data<const float>(),
      &four_bit_book(op, quant_type),
      blocksize,
      optional_bias(result, op, bias, N),
      T,
      N,
      K,
      result.data<void>(),
      result.dtype(),
      result.dtype(),
  };
  if (result.numel() == 0) return;
  const auto kernel = kernels().gemm->gemm_4bit;
  parallel_for(N, checked_product(op, T, K), [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

}  // namespace

void bind_gemm(py::module_& m) {
  m.def("gemm", &gemm, py::arg("x_TK"), py::arg("w_NK"), py::arg("T"), py::arg("N"), py::arg("K"), py::arg("bias"), py::arg("out"));
  m.def("gemm_4bit", &gemm_4bit, py::arg("x_TK"), py::arg("packed"), py::arg("absmax"), py::arg("blocksize"), py::arg("quant_type"),
        py::arg("T"), py::arg("N"), py::arg("K"), py::arg("bias"), py::arg("out"));
}

}  // namespace q_cpu
