#include "norm.h"

#include "module.h"
#include "state.h"
#include "threads.h"

namespace q_cpu {

namespace {

void rms_norm(py::handle x, py::handle weight, double eps, int64_t rows, int64_t K, py::handle out) {
  constexpr const char* op = "rms_norm";
  const TensorView in = TensorView(x, {op, "x"}, Layout::strided).floating().shaped({rows, K});
  const RmsNorm args{
      in.data<const void>(),
      in.stride(0),
      nullptr,
      0,
      TensorView(weight, {op, "weight"}).of(in).sized(K).data<const void>(),
      static_cast<float>(eps),
      rows,
      K,
      nullptr,
      TensorView(out, {op, "out"}).of(in).sized(in.numel()).data<void>(),
      in.dtype(),
  };
  if (in.numel() == 0) return;  // however many rows it has
  const auto kernel = kernels().norm->rms_norm;
  parallel_for(rows, K, [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

void add_rms_norm(py::handle x, py::handle residual, py::handle weight, double eps, int64_t rows, int64_t K, py::handle total,
                  py::handle out) {
  constexpr const char* op = "add_rms_norm";
  const TensorView in = TensorView(x, {op, "x"}, Layout::strided).floating().shaped({rows, K});
  const TensorView added = TensorView(residual, {op, "residual"}, Layout::strided).of(in).shaped({rows, K});
  const RmsNorm args{
      in.data<const void>(),
      in.stride(0),
      added.data<const void>(),
      added.stride(0),
      TensorView(weight, {op, "weight"}).of(in).sized(K).data<const void>(),
      static_cast<float>(eps),
      rows,
      K,
      TensorView(total, {op, "total"}).of(in).sized(in.numel()).data<void>(),
      TensorView(out, {op, "out"}).of(in).sized(in.numel()).data<void>(),
      in.dtype(),
  };
  if (in.numel() == 0) return;
  const auto kernel = kernels().norm->rms_norm;
  parallel_for(rows, K, [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

void rotary_embedding(py::handle q, py::handle k, py::handle positions, py::handle cos, py::handle sin, bool interleaved, int64_t T,
                      int64_t H, int64_t G, int64_t D, int64_t P, int64_t F, py::handle q_out, py::handle k_out) {
  constexpr const char* op = "rotary_embedding";
  if (F < 0 || F > D / 2) bad_value({op, "cos"}, "has " + std::to_string(F) + " pairs, expected at most half of D");
  const TensorView queries = TensorView(q, {op, "q_THD"}, Layout::strided).floating().shaped({T, H, D});
  const TensorView keys = TensorView(k, {op, "k_TGD"}, Layout::strided).of(queries).shaped({T, G, D});
  const int64_t* at = TensorView(positions, {op, "positions"}).of(Scalar::i64).sized(T).data<const int64_t>();
  for (int64_t t = 0; t < T; ++t) {
    if (at[t] < 0 || at[t] >= P) {
      bad_value({op, "positions", t}, "is " + std::to_string(at[t]) + ", expected 0 to " + std::to_string(P - 1));
    }
  }
  const RotaryEmbedding args{
      {queries.data<const void>(), queries.stride(0), queries.stride(1), H,
       TensorView(q_out, {op, "q_out"}).of(queries).sized(queries.numel()).data<void>()},
      {keys.data<const void>(), keys.stride(0), keys.stride(1), G,
       TensorView(k_out, {op, "k_out"}).of(queries).sized(keys.numel()).data<void>()},
      at,
      TensorView(cos, {op, "cos"}).of(Scalar::f32).sized(checked_product(op, P, F)).data<const float>(),
      TensorView(sin, {op, "sin"}).of(Scalar::f32).sized(checked_product(op, P, F)).data<const float>(),
      D,
      F,
      interleaved,
      queries.dtype(),
  };
  if (queries.numel() == 0 && keys.numel() == 0) return;
  const auto kernel = kernels().norm->rotary_embedding;
  parallel_for(T, checked_product(op, H + G, D), [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

void silu_and_mul(py::handle x, int64_t rows, int64_t N, py::handle out) {
  constexpr const char* op = "silu_and_mul";
  const TensorView in = TensorView(x, {op, "x"}, Layout::strided).floating().shaped({rows, checked_product(op, 2, N)});
  const SiluAndMul args{
      in.data<const void>(), in.stride(0), rows, N, TensorView(out, {op, "out"}).of(in).sized(rows * N).data<void>(), in.dtype(),
  };
  if (in.numel() == 0) return;
  const auto kernel = kernels().norm->silu_and_mul;
  parallel_for(rows, checked_product(op, 2, N), [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

}  // namespace

void bind_norm(py::module_& m) {
  m.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("rows"), py::arg("K"), py::arg("out"));
  m.def("add_rms_norm", &add_rms_norm, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("eps"), py::arg("rows"),
        py::arg("K"), py::arg("total"), py::arg("out"));
  m.def("rotary_embedding", &rotary_embedding, py::arg("q_THD"), py::arg("k_TGD"), py::arg("positions"), py::arg("cos"),
        py::arg("sin"), py::arg("interleaved"), py::arg("T"), py::arg("H"), py::arg("G"), py::arg("D"), py::arg("P"), py::arg("F"),
        py::arg("q_out"), py::arg("k_out"));
  m.def("silu_and_mul", &silu_and_mul, py::arg("x"), py::arg("rows"), py::arg("N"), py::arg("out"));
}

}  // namespace q_cpu
