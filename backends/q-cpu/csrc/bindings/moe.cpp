// Mixtures of experts: tokens are brought to their experts, the experts' products are those of the gemm families, and the results
// are brought back. What is kept between the steps is bounded twice: tokens are taken as many at a time as have sums of kSumBytes,
// and their pairs as many as have inputs and results of kPairBytes. An expert's weight is read once for each such run of its pairs,
// which pays as long as those are dozens.

#include "moe.h"

#include <cstring>
#include <memory>
#include <vector>

#include "gemm.h"
#include "int8.h"
#include "module.h"
#include "norm.h"
#include "state.h"
#include "threads.h"

namespace q_cpu {

namespace {

constexpr int64_t kSumBytes = int64_t{3} << 20;
constexpr int64_t kPairBytes = int64_t{5} << 19;
constexpr int64_t kFewest = 16;         // tokens, or pairs, that are taken at once however large they are
constexpr int64_t kRowsAtOnce = 64;     // of an expert's weight that a thread takes, and decodes if they are fp8
constexpr int64_t kColumnsAtOnce = 64;  // of the sums that a thread takes

void route_topk(py::handle logits, int64_t T, int64_t E, int64_t k, bool sigmoid, bool renormalize, py::handle weights,
                py::handle ids) {
  constexpr const char* op = "route_topk";
  if (E < 1 || E > kMaxExperts) bad_value({op, "logits_TE"}, "has " + std::to_string(E) + " experts, expected 1 to 1024");
  if (k < 1 || k > E) bad_value({op, "k"}, "is " + std::to_string(k) + ", expected 1 to " + std::to_string(E));
  const int64_t chosen = checked_product(op, T, k);
  const TensorView in = TensorView(logits, {op, "logits_TE"}).floating().sized(checked_product(op, T, E));
  const RouteTopk args{
      in.data<const void>(),
      in.dtype(),
      T,
      E,
      k,
      sigmoid,
      renormalize,
      TensorView(weights, {op, "weights"}).of(Scalar::f32).sized(chosen).data<float>(),
      TensorView(ids, {op, "ids"}).of(Scalar::i32).sized(chosen).data<int32_t>(),
  };
  const auto kernel = kernels().moe->route_topk;
  parallel_for(T, E * k, [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

// The weights of all experts, [E, rows, columns] as the format holds them.
class ExpertWeights {
 public:
  ExpertWeights(const char* op, const char* name, py::handle weight, py::handle scale, const std::string& format, Float dtype,
                int64_t E, int64_t rows, int64_t columns, int64_t blocksize)
      : dtype_(dtype), rows_(rows), columns_(columns), blocksize_(blocksize) {
    const int64_t elements = checked_product(op, rows, columns);
    const TensorView view(weight, {op, name});
    const std::string scale_name = std::string(name) + "_scale";
    int64_t scales = rows;
    if (format == "dense") {
      kind_ = Kind::dense;
      stride_ = elements * (dtype == Float::f32 ? 4 : 2);
      view.floating().sized(checked_product(op, E, elements));
      if (view.dtype() != dtype) bad_type({op, name}, "has another dtype than x_TK");
      scales = 0;
    } else if (format == "int8" || format == "fp8") {
      kind_ = format == "int8" ? Kind::int8 : Kind::fp8;
      stride_ = elements;
      view.of(kind_ == Kind::int8 ? Scalar::i8 : Scalar::u8).sized(checked_product(op, E, elements));
    } else {
      kind_ = Kind::four_bit;
      book_ = &four_bit_book(op, format, "format");
      stride_ = elements / 2 + elements % 2;
      scales = count_blocks(op, elements, blocksize, kMinFourBitBlocksize);
      view.of(Scalar::u8).sized(checked_product(op, E, stride_));
    }
    data_ = view.data<const uint8_t>();
    scales_ = scales;
    if (scales > 0) {
      scale_ =
          TensorView(scale, {op, scale_name.c_str()}).of(Scalar::f32).sized(checked_product(op, E, scales)).data<const float>();
    }
  }

  // x [T, columns] times rows first…last of an expert, to out [T, rows].
  void multiply(int64_t expert, const void* x, int64_t T, int64_t first, int64_t last, void* out, Float out_dtype) const {
    const Kernels& k = kernels();
    const uint8_t* data = data_ + expert * stride_;
    const float* scale = scale_ + expert * scales_;
    switch (kind_) {
      case Kind::dense:
        return k.gemm->gemm({x, data, nullptr, T, rows_, columns_, out, dtype_, out_dtype}, first, last);
      case Kind::int8:
        return k.int8->gemm_int8_weight(
            {x, reinterpret_cast<const int8_t*>(data), scale, nullptr, T, rows_, columns_, out, dtype_, out_dtype}, first, last);
      case Kind::four_bit:
        return k.gemm->gemm_4bit({x, data, scale, book_, blocksize_, nullptr, T, rows_, columns_, out, dtype_, out_dtype}, first,
                                 last);
      case Kind::fp8:
        return multiply_fp8(data, scale, x, T, first, last, out, out_dtype);
    }
  }

 private:
  enum class Kind { dense, int8, fp8, four_bit };

  // Decodes some rows at a time, and multiplies with them as with a dense weight, whose outputs begin at the first of them.
  void multiply_fp8(const uint8_t* codes, const float* scale, const void* x, int64_t T, int64_t first, int64_t last, void* out,
                    Float out_dtype) const {
    const std::unique_ptr<uint8_t[]> decoded(new uint8_t[static_cast<size_t>(kRowsAtOnce * columns_ * bytes_of(dtype_))]);
    for (int64_t row = first; row < last; row += kRowsAtOnce) {
      const int64_t rows = std::min(kRowsAtOnce, last - row);
      kernels().moe->decode_fp8({codes + row * columns_, scale + row, columns_, decoded.get(), dtype_}, 0, rows);
      void* outputs = static_cast<uint8_t*>(out) + row * bytes_of(out_dtype);
      kernels().gemm->gemm({x, decoded.get(), nullptr, T, rows_, columns_, outputs, dtype_, out_dtype}, 0, rows);
    }
  }

  static int64_t bytes_of(Float dtype) { return dtype == Float::f32 ? 4 : 2; }

  Kind kind_;
  Float dtype_;
  const FourBitBook* book_ = nullptr;
  const uint8_t* data_ = nullptr;
  const float* scale_ = nullptr;
  int64_t rows_, columns_, blocksize_;
  int64_t stride_ = 0;  // bytes from expert to expert
  int64_t scales_ = 0;  // floats from expert to expert
};

// The pairs of a token and an expert, by expert, in the tokens' order.
struct Pairs {
  std::vector<int64_t> tokens;   // of each pair
  std::vector<float> weights;    // of each pair
  std::vector<int64_t> experts;  // that have pairs
  std::vector<int64_t> starts;   // the first pair of each of them, and the end

  Pairs(const int32_t* ids_Tk, const float* weights_Tk, int64_t T, int64_t k, int64_t E) {
    std::vector<int64_t> next(static_cast<size_t>(E) + 1);
    for (int64_t i = 0; i < T * k; ++i) {
      if (ids_Tk[i] >= 0) ++next[static_cast<size_t>(ids_Tk[i]) + 1];
    }
    for (int64_t e = 0; e < E; ++e) {
      if (next[e + 1] > 0) {
        experts.push_back(e);
        starts.push_back(next[e]);
      }
      next[e + 1] += next[e];
    }
    starts.push_back(next[E]);
    tokens.resize(static_cast<size_t>(next[E]));
    weights.resize(tokens.size());
    for (int64_t i = 0; i < T * k; ++i) {
      if (ids_Tk[i] < 0) continue;
      const int64_t pair = next[ids_Tk[i]]++;
      tokens[pair] = i / k;
      weights[pair] = weights_Tk[i];
    }
  }
};

// Pairs that are computed together: whole experts, or a part of one that has too many.
struct Run {
  struct Part {
    int64_t expert, start, end;  // pairs
  };
  std::vector<Part> parts;

  int64_t start() const { return parts.front().start; }
  int64_t count() const { return parts.back().end - parts.front().start; }
};

// Cuts the pairs into runs of at most `most`. An expert with more is cut evenly, so that no part is left with few.
std::vector<Run> runs_of(const Pairs& pairs, int64_t most) {
  std::vector<Run> runs;
  for (size_t i = 0; i < pairs.experts.size(); ++i) {
    const int64_t first = pairs.starts[i], count = pairs.starts[i + 1] - first;
    const int64_t parts = (count + most - 1) / most;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t start = first + count * part / parts, end = first + count * (part + 1) / parts;
      if (runs.empty() || end - runs.back().start() > most) runs.emplace_back();
      runs.back().parts.push_back({pairs.experts[i], start, end});
    }
  }
  return runs;
}

// Shares the rows of a run's experts out, and multiplies each with its pairs: x [P, columns] to out [P, rows].
void multiply_experts(const ExpertWeights& weights, const Run& run, int64_t rows, int64_t columns, const uint8_t* x,
                      int64_t x_row_bytes, uint8_t* out, int64_t out_row_bytes, Float out_dtype) {
  const int64_t pieces = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const int64_t experts = static_cast<int64_t>(run.parts.size());
  parallel_for(experts * pieces, kRowsAtOnce * columns, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last;) {
      const int64_t which = unit / pieces;
      const int64_t end = std::min(last, (which + 1) * pieces);
      const Run::Part& part = run.parts[which];
      const int64_t skipped = part.start - run.start();
      weights.multiply(part.expert, x + skipped * x_row_bytes, part.end - part.start, (unit - which * pieces) * kRowsAtOnce,
                       std::min(rows, (end - which * pieces) * kRowsAtOnce), out + skipped * out_row_bytes, out_dtype);
      unit = end;
    }
  });
}

void fused_moe(py::handle x, py::handle w13, py::handle w2, py::handle topk_weights, py::handle topk_ids, const std::string& format,
               int64_t T, int64_t K, int64_t N, int64_t E, int64_t k, py::handle w13_scale, py::handle w2_scale, int64_t blocksize,
               py::handle out) {
  constexpr const char* op = "fused_moe";
  const TensorView in = TensorView(x, {op, "x_TK"}).floating().sized(checked_product(op, T, K));
  const Float dtype = in.dtype();
  const int64_t size = dtype == Float::f32 ? 4 : 2;
  const ExpertWeights first_weights(op, "w13", w13, w13_scale, format, dtype, E, checked_product(op, 2, N), K, blocksize);
  const ExpertWeights second_weights(op, "w2", w2, w2_scale, format, dtype, E, K, N, blocksize);
  const int64_t chosen = checked_product(op, T, k);
  const float* weights = TensorView(topk_weights, {op, "topk_weights"}).of(Scalar::f32).sized(chosen).data<const float>();
  const int32_t* ids = TensorView(topk_ids, {op, "topk_ids"}).of(Scalar::i32).sized(chosen).data<const int32_t>();
  for (int64_t i = 0; i < chosen; ++i) {
    if (ids[i] >= E) bad_value({op, "topk_ids", i}, "is " + std::to_string(ids[i]) + ", expected at most " + std::to_string(E - 1));
  }
  uint8_t* result = TensorView(out, {op, "out"}).of(in).sized(in.numel()).data<uint8_t>();
  if (in.numel() == 0) return;
  if (E == 0 || N == 0) {  // experts that hold nothing: how many there are, or how large, is anything
    std::memset(result, 0, static_cast<size_t>(in.numel() * size));
    return;
  }

  const Kernels& all = kernels();
  const bool sums_in_place = dtype == Float::f32;  // or beside the result, whose type is too coarse to add up in
  const int64_t tokens_at_once = std::min(T, std::max(kFewest, kSumBytes / (K * 4)));
  const int64_t intermediate_bytes = std::max(2 * N * size, K * 4);  // of a pair's gate and up, and of its result later
  const int64_t pair_bytes = K * size + intermediate_bytes + N * size;
  const int64_t pairs_at_once = std::min(tokens_at_once * k, std::max(kFewest, kPairBytes / pair_bytes));
  const auto buffer = [](int64_t bytes) { return std::unique_ptr<uint8_t[]>(new uint8_t[static_cast<size_t>(bytes)]); };
  const auto inputs = buffer(pairs_at_once * K * size);
  const auto intermediate = buffer(pairs_at_once * intermediate_bytes);
  const auto hidden = buffer(pairs_at_once * N * size);
  const auto sums_beside = buffer(sums_in_place ? 0 : tokens_at_once * K * 4);
  for (int64_t begin = 0; begin < T; begin += tokens_at_once) {
    const int64_t count = std::min(tokens_at_once, T - begin);
    const Pairs pairs(ids + begin * k, weights + begin * k, count, k, E);
    uint8_t* const block = result + begin * K * size;
    float* const sums = reinterpret_cast<float*>(sums_in_place ? block : sums_beside.get());
    std::memset(sums, 0, static_cast<size_t>(count * K * 4));
    for (const Run& run : runs_of(pairs, pairs_at_once)) {
      const int64_t P = run.count();
      const int64_t* tokens = pairs.tokens.data() + run.start();
      const GatherTokens gather{in.data<const uint8_t>() + begin * K * size, tokens, K * size, inputs.get()};
      parallel_for(P, K, [&](int64_t first, int64_t last) { all.moe->gather_tokens(gather, first, last); });
      multiply_experts(first_weights, run, 2 * N, K, inputs.get(), K * size, intermediate.get(), 2 * N * size, dtype);
      const SiluAndMul gate{intermediate.get(), 2 * N, P, N, hidden.get(), dtype};
      parallel_for(P, 2 * N, [&](int64_t first, int64_t last) { all.norm->silu_and_mul(gate, first, last); });
      multiply_experts(second_weights, run, K, N, hidden.get(), N * size, intermediate.get(), K * 4, Float::f32);
      const AddWeighted add{
          reinterpret_cast<const float*>(intermediate.get()), tokens, pairs.weights.data() + run.start(), P, K, sums};
      parallel_for((K + kColumnsAtOnce - 1) / kColumnsAtOnce, P * kColumnsAtOnce, [&](int64_t first, int64_t last) {
        all.moe->add_weighted(add, first * kColumnsAtOnce, std::min(K, last * kColumnsAtOnce));
      });
    }
    if (sums_in_place) continue;
    const RoundSums round{sums, block, dtype};
    parallel_for(count * K, 1, [&](int64_t first, int64_t last) { all.moe->round_sums(round, first, last); });
  }
}

}  // namespace

void bind_moe(py::module_& m) {
  m.def("route_topk", &route_topk, py::arg("logits_TE"), py::arg("T"), py::arg("E"), py::arg("k"), py::arg("sigmoid"),
        py::arg("renormalize"), py::arg("weights"), py::arg("ids"));
  m.def("fused_moe", &fused_moe, py::arg("x_TK"), py::arg("w13"), py::arg("w2"), py::arg("topk_weights"), py::arg("topk_ids"),
        py::arg("format"), py::arg("T"), py::arg("K"), py::arg("N"), py::arg("E"), py::arg("k"), py::arg("w13_scale"),
        py::arg("w2_scale"), py::arg("blocksize"), py::arg("out"));
}

}  // namespace q_cpu
