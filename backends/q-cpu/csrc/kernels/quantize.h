// Quantization and its inverse, in flat blocks and in rows.

#pragma once

#include "code_book.h"
#include "kernels.h"

namespace q_cpu {

struct QuantizeBlockwise {
  const void* A;
  Float dtype;
  int64_t numel;
  int64_t blocksize;
  const CodeBook* book;
  uint8_t* codes;
  float* absmax;
};

struct DequantizeBlockwise {
  const uint8_t* codes;
  const float* absmax;
  const ValueTable* table;
  int64_t numel;
  int64_t blocksize;
  void* out;
  Float dtype;
};

struct Quantize4bit {
  const void* A;
  Float dtype;
  int64_t numel;
  int64_t blocksize;
  const FourBitBook* book;
  float tensor_scale;  // of ScaleRule::e4m3: the tensor's largest finite absmax / 2688
  uint8_t* packed;
  float* absmax;
};

struct Dequantize4bit {
  const uint8_t* packed;
  const float* absmax;
  const FourBitBook* book;
  int64_t numel;
  int64_t blocksize;
  void* out;
  Float dtype;
};

struct QuantizeInt8Rowwise {
  const void* A_TK;
  Float dtype;
  int64_t T, K;
  float threshold;  // 0: no outliers
  int8_t* q_TK;
  float* absmax_T;
  uint8_t* outliers_K;  // 0 or 1
};

struct QuantizeKernels {
  // Ranges of blocks.
  void (*quantize_blockwise)(const QuantizeBlockwise&, int64_t first, int64_t last);
  void (*dequantize_blockwise)(const DequantizeBlockwise&, int64_t first, int64_t last);
  void (*find_absmax)(const Quantize4bit&, int64_t first, int64_t last);  // writes absmax only
  void (*quantize_4bit)(const Quantize4bit&, int64_t first, int64_t last);
  void (*dequantize_4bit)(const Dequantize4bit&, int64_t first, int64_t last);
  // Ranges of columns, of all tokens; then, with the outlier columns known, ranges of tokens.
  void (*find_outlier_columns)(const QuantizeInt8Rowwise&, int64_t first, int64_t last);
  void (*quantize_int8_rowwise)(const QuantizeInt8Rowwise&, int64_t first, int64_t last);
};

}  // namespace q_cpu
