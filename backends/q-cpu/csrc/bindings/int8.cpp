#include "int8.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "module.h"
#include "quantize.h"
#include "state.h"
#include "threads.h"

namespace q_cpu {

namespace {

constexpr int64_t kCodeBytes = int64_t{4} << 20;  // of the tokens that are quantized at a time
constexpr int64_t kFewestTokens = 64;

const float* optional_bias(const char* op, py::handle bias, int64_t N) {
  if (bias.is_none()) return nullptr;
  return TensorView(bias, {op, "bias"}).of(Scalar::f32).sized(N).data<const float>();
}

// Shares the out features out, in pieces that suit the kernel for so many tokens.
template <class Args>
void for_rows(const char* op, const Args& args, void (*kernel)(const Args&, int64_t, int64_t)) {
  const int64_t piece = args.T > kFewTokens ? kManyTokensRows : kFewTokensRows;
  const int64_t pieces = (args.N + piece - 1) / piece;
  parallel_for(pieces, piece * checked_product(op, args.T, args.K),
               [&](int64_t first, int64_t last) { kernel(args, first * piece, std::min(last * piece, args.N)); });
}

void int8_gemm(py::handle a, py::handle b, py::handle a_scale, py::handle b_scale, int64_t T, int64_t N, int64_t K, py::handle bias,
               py::handle out) {
  constexpr const char* op = "int8_gemm";
  if (K > kMaxInt8K) bad_value({op, "a_TK"}, "has K = " + std::to_string(K) + ", expected at most " + std::to_string(kMaxInt8K));
  const TensorView result = TensorView(out, {op, "out"}).floating().sized(checked_product(op, T, N));
  const Int8Gemm args{
      TensorView(a, {op, "a_TK"}).of(Scalar::i8).sized(checked_product(op, T, K)).data<const int8_t>(),
      TensorView(b, {op, "b_NK"}).of(Scalar::i8).sized(checked_product(op, N, K)).data<const int8_t>(),
      TensorView(a_scale, {op, "a_scale"}).of(Scalar::f32).sized(T).data<const float>(),
      TensorView(b_scale, {op, "b_scale"}).of(Scalar::f32).sized(N).data<const float>(),
      optional_bias(op, bias, N),
      T,
      N,
      K,
      result.data<void>(),
      result.dtype(),
  };
  if (result.numel() == 0) return;
  for_rows(op, args, kernels().int8->int8_gemm);
}

void gemm_int8_weight(py::handle x, py::handle w, py::handle w_scale, int64_t T, int64_t N, int64_t K, py::handle bias,
                      py::handle out) {
  constexpr const char* op = "gemm_int8_weight";
  const TensorView result = TensorView(out, {op, "out"}).floating().sized(checked_product(op, T, N));
  const GemmInt8Weight args{
      TensorView(x, {op, "x_TK"}).of(result).sized(checked_product(op, T, K)).data<const void>(),
      TensorView(w, {op, "w_NK"}).of(Scalar::i8).sized(checked_product(op, N, K)).data<const int8_t>(),
      TensorView(w_scale, {op, "w_scale"}).of(Scalar::f32).sized(N).data<const float>(),
      optional_bias(op, bias, N),
      T,
      N,
      K,
      result.data<void>(),
      result.dtype(),
      result.dtype(),
  };
  if (result.numel() == 0) return;
  for_rows(op, args, kernels().int8->gemm_int8_weight);
}

// Integers in proportion to a book's values: the smallest exact ones if there are any in int8 (E2M1, integers), else 127ths of the
// largest value, rounded.
Int8Book int8_book(const FourBitBook& book) {
  constexpr float kExact = 1e-5f;
  float largest = 0.0f;
  for (const float value : book.values) largest = std::max(largest, std::fabs(value));
  float divisor = 127.0f / largest;
  for (int candidate = 1; candidate <= 127; ++candidate) {
    const float scale = static_cast<float>(candidate);
    if (scale * largest > 127.0f) break;
    const auto is_exact = [scale](float value) { return std::fabs(value * scale - std::nearbyint(value * scale)) < kExact; };
    if (std::all_of(std::begin(book.values), std::end(book.values), is_exact)) {
      divisor = scale;
      break;
    }
  }
  Int8Book rounded;
  rounded.unit = 1.0f / divisor;
  for (int code = 0; code < 16; ++code) rounded.values[code] = static_cast<int8_t>(std::nearbyint(book.values[code] * divisor));
  return rounded;
}

template <class T>
std::unique_ptr<T[]> uninitialized(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}

void gemm_4bit_int8(py::handle x, py::handle packed, py::handle absmax, int64_t blocksize, const std::string& quant_type, int64_t T,
                    int64_t N, int64_t K, py::handle bias, py::handle out) {
  constexpr const char* op = "gemm_4bit";
  const int64_t weights = checked_product(op, N, K);
  const TensorView result = TensorView(out, {op, "out"}).floating().sized(checked_product(op, T, N));
  const TensorView tokens = TensorView(x, {op, "x_TK"}).of(result).sized(checked_product(op, T, K));
  const int64_t blocks = count_blocks(op, weights, blocksize, kMinFourBitBlocksize);
  const TensorView nibbles = TensorView(packed, {op, "packed"}).of(Scalar::u8).sized(weights / 2 + weights % 2);
  const TensorView scales = TensorView(absmax, {op, "absmax"}).of(Scalar::f32).sized(blocks);
  const float* added = optional_bias(op, bias, N);
  const Int8Book book = int8_book(four_bit_book(op, quant_type));
  if (result.numel() == 0) return;

  // Tokens are quantized so many at a time, which bounds what is kept; in even shares, as a few tokens go another way than many.
  const int64_t tokens_at_once = std::max(kFewestTokens, kCodeBytes / std::max<int64_t>(1, K));
  const int64_t shares = (T + tokens_at_once - 1) / tokens_at_once;
  const int64_t least = T / shares, longer = T % shares;  // the first `longer` shares have one more
  const int64_t most = least + (longer > 0);
  const int64_t span = std::min(blocksize, kMaxSpan);
  const bool whole_blocks = K % blocksize == 0;
  const auto codes = uninitialized<int8_t>(most * K);
  const auto row_absmax = uninitialized<float>(most);
  const auto outliers = uninitialized<uint8_t>(K);
  const auto span_sums = uninitialized<int32_t>(whole_blocks ? most * (K / span) : 0);
  std::fill_n(outliers.get(), K, uint8_t{0});  // there are none without a threshold
  const Kernels& k = kernels();
  const int64_t size = result.dtype() == Float::f32 ? 4 : 2;
  for (int64_t share = 0; share < shares; ++share) {
    const int64_t begin = least * share + std::min(share, longer), count = least + (share < longer);
    const void* x_TK = tokens.data<const uint8_t>() + begin * K * size;
    const QuantizeInt8Rowwise rows{x_TK, tokens.dtype(), count, K, 0.0f, codes.get(), row_absmax.get(), outliers.get()};
    const Gemm4bitInt8 args{
        codes.get(),
        row_absmax.get(),
        whole_blocks ? span_sums.get() : nullptr,
        nibbles.data<const uint8_t>(),
        scales.data<const float>(),
        &book,
        blocksize,
        span,
        added,
        count,
        N,
        K,
        result.data<uint8_t>() + begin * N * size,
        result.dtype(),
    };
    parallel_for(count, K, [&](int64_t first, int64_t last) {
      k.quantize->quantize_int8_rowwise(rows, first, last);
      if (args.span_sums) k.int8->sum_spans(args, first, last);
    });
    for_rows(op, args, k.int8->gemm_4bit_int8);
  }
}

}  // namespace

void bind_int8(py::module_& m) {
  m.def("int8_gemm", &int8_gemm, py::arg("a_TK"), py::arg("b_NK"), py::arg("a_scale"), py::arg("b_scale"), py::arg("T"),
        py::arg("N"), py::arg("K"), py::arg("bias"), py::arg("out"));
  m.def("gemm_int8_weight", &gemm_int8_weight, py::arg("x_TK"), py::arg("w_NK"), py::arg("w_scale"), py::arg("T"), py::arg("N"),
        py::arg("K"), py::arg("bias"), py::arg("out"));
  m.def("gemm_4bit_int8", &gemm_4bit_int8, py::arg("x_TK"), py::arg("packed"), py::arg("absmax"), py::arg("blocksize"),
        py::arg("quant_type"), py::arg("T"), py::arg("N"), py::arg("K"), py::arg("bias"), py::arg("out"));
}

}  // namespace q_cpu
