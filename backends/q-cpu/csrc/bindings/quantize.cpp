#include "quantize.h"

#include <algorithm>
#include <cmath>

#include "module.h"
#include "state.h"
#include "threads.h"

namespace q_cpu {

namespace {

// Blocks of a 4-bit tensor, where a type with scales of its own has smaller ones too.
int64_t count_4bit_blocks(const char* op, int64_t numel, int64_t blocksize, const FourBitBook& book) {
  constexpr int64_t kSmallest = 16;
  if (book.scale == ScaleRule::e4m3 && blocksize == kSmallest) return (numel + kSmallest - 1) / kSmallest;
  return count_blocks(op, numel, blocksize);
}

void quantize_blockwise(py::handle A, py::handle code, int64_t blocksize, py::handle codes, py::handle absmax) {
  constexpr const char* op = "quantize_blockwise";
  const TensorView in = TensorView(A, {op, "A"}).floating();
  const auto book = code_book({op, "code"}, code);
  const int64_t blocks = count_blocks(op, in.numel(), blocksize);
  const QuantizeBlockwise args{
      in.data<const void>(),
      in.dtype(),
      in.numel(),
      blocksize,
      book.get(),
      TensorView(codes, {op, "codes"}).of(Scalar::u8).sized(in.numel()).data<uint8_t>(),
      TensorView(absmax, {op, "absmax"}).of(Scalar::f32).sized(blocks).data<float>(),
  };
  const auto kernel = kernels().quantize->quantize_blockwise;
  parallel_for(blocks, blocksize, [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

void dequantize_blockwise(py::handle codes, py::handle absmax, py::handle code, int64_t blocksize, py::handle out) {
  constexpr const char* op = "dequantize_blockwise";
  const TensorView result = TensorView(out, {op, "out"}).floating();
  const TensorView book = TensorView(code, {op, "code"}).of(Scalar::f32);
  if (book.numel() < 2 || book.numel() > kBookSize) {
    bad_value({op, "code"}, "has " + std::to_string(book.numel()) + " entries, expected 2 to " + std::to_string(kBookSize));
  }
  // A whole table, so that a code beyond the book decodes to something and not to what lies behind it in memory.
  ValueTable table;
  build_value_table(book.data<const float>(), static_cast<int>(book.numel()), 0.0f, &table);
  const int64_t blocks = count_blocks(op, result.numel(), blocksize);
  const DequantizeBlockwise args{
      TensorView(codes, {op, "codes"}).of(Scalar::u8).sized(result.numel()).data<const uint8_t>(),
      TensorView(absmax, {op, "absmax"}).of(Scalar::f32).sized(blocks).data<const float>(),
      &table,
      result.numel(),
      blocksize,
      result.data<void>(),
      result.dtype(),
  };
  const auto kernel = kernels().quantize->dequantize_blockwise;
  parallel_for(blocks, blocksize, [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

// The scale of a whole tensor, of types that have one, from the absmax of its blocks.
float tensor_scale(const Quantize4bit& args, int64_t blocks) {
  const auto kernel = kernels().quantize->find_absmax;
  parallel_for(blocks, args.blocksize, [&](int64_t first, int64_t last) { kernel(args, first, last); });
  float largest = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    if (std::isfinite(args.absmax[block])) largest = std::max(largest, args.absmax[block]);
  }
  return largest / 2688;
}

void quantize_4bit(py::handle A, int64_t blocksize, const std::string& quant_type, py::handle packed, py::handle absmax) {
  constexpr const char* op = "quantize_4bit";
  const TensorView in = TensorView(A, {op, "A"}).floating();
  const FourBitBook& book = four_bit_book(op, quant_type);
  const int64_t blocks = count_4bit_blocks(op, in.numel(), blocksize, book);
  Quantize4bit args{
      in.data<const void>(),
      in.dtype(),
      in.numel(),
      blocksize,
      &book,
      0.0f,
      TensorView(packed, {op, "packed"}).of(Scalar::u8).sized((in.numel() + 1) / 2).data<uint8_t>(),
      TensorView(absmax, {op, "absmax"}).of(Scalar::f32).sized(blocks).data<float>(),
  };
  if (book.scale == ScaleRule::e4m3) args.tensor_scale = tensor_scale(args, blocks);
  const auto kernel = kernels().quantize->quantize_4bit;
  parallel_for(blocks, blocksize, [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

void dequantize_4bit(py::handle packed, py::handle absmax, int64_t blocksize, const std::string& quant_type, py::handle out) {
  constexpr const char* op = "dequantize_4bit";
  const TensorView result = TensorView(out, {op, "out"}).floating();
  const FourBitBook& book = four_bit_book(op, quant_type);
  const int64_t blocks = count_4bit_blocks(op, result.numel(), blocksize, book);
  const Dequantize4bit args{
      TensorView(packed, {op, "packed"}).of(Scalar::u8).sized((result.numel() + 1) / 2).data<const uint8_t>(),
      TensorView(absmax, {op, "absmax"}).of(Scalar::f32).sized(blocks).data<const float>(),
      &book,
      result.numel(),
      blocksize,
      result.data<void>(),
      result.dtype(),
  };
  const auto kernel = kernels().quantize->dequantize_4bit;
  parallel_for(blocks, blocksize, [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

void quantize_int8_rowwise(py::handle A_TK, double threshold, py::handle q, py::handle absmax, py::handle outliers) {
  constexpr const char* op = "quantize_int8_rowwise";
  const TensorView in = TensorView(A_TK, {op, "A_TK"}).floating();
  const TensorView scales = TensorView(absmax, {op, "absmax"}).of(Scalar::f32);
  const TensorView mask = TensorView(outliers, {op, "outliers"}).of(Scalar::boolean);
  if (!(threshold >= 0)) bad_value({op, "threshold"}, "is " + std::to_string(threshold) + ", expected 0 or more");
  const int64_t T = scales.numel();
  const int64_t K = mask.numel();
  in.sized(checked_product(op, T, K));
  const QuantizeInt8Rowwise args{
      in.data<const void>(),
      in.dtype(),
      T,
      K,
      static_cast<float>(threshold),
      TensorView(q, {op, "q"}).of(Scalar::i8).sized(in.numel()).data<int8_t>(),
      scales.data<float>(),
      mask.data<uint8_t>(),
  };
  const QuantizeKernels& k = *kernels().quantize;
  parallel_for(K, T, [&](int64_t first, int64_t last) { k.find_outlier_columns(args, first, last); });
  parallel_for(T, K, [&](int64_t first, int64_t last) { k.quantize_int8_rowwise(args, first, last); });
}

}  // namespace

void bind_quantize(py::module_& m) {
  m.def("quantize_blockwise", &quantize_blockwise, py::arg("A"), py::arg("code"), py::arg("blocksize"), py::arg("codes"),
        py::arg("absmax"));
  m.def("dequantize_blockwise", &dequantize_blockwise, py::arg("codes"), py::arg("absmax"), py::arg("code"), py::arg("blocksize"),
        py::arg("out"));
  m.def("quantize_4bit", &quantize_4bit, py::arg("A"), py::arg("blocksize"), py::arg("quant_type"), py::arg("packed"),
        py::arg("absmax"));
  m.def("dequantize_4bit", &dequantize_4bit, py::arg("packed"), py::arg("absmax"), py::arg("blocksize"), py::arg("quant_type"),
        py::arg("out"));
  m.def("quantize_int8_rowwise", &quantize_int8_rowwise, py::arg("A_TK"), py::arg("threshold"), py::arg("q"), py::arg("absmax"),
        py::arg("outliers"));
}

}  // namespace q_cpu
