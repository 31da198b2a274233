// What the kernels take and the table they are called through.
//
// A kernel knows pointers, sizes and strides only. It works on a half-open range of its units (blocks, rows, columns, elements),
// and the result of a unit depends on nothing but that unit's input, so any partition over threads gives the same bits.
//
// The kernel sources are compiled once an ISA level, each time into a namespace of its own; a `Kernels` table is all that a level
// exports. This header must stay free of inline functions and of std: what it defined would be compiled with AVX flags by one level
// and picked by the linker for another.
//
// Letters: T tokens, N out features, K in features.

#pragma once

#include <stdint.h>

namespace q_cpu {

enum class Float : uint8_t { f32, bf16, f16 };

constexpr int64_t kMinBlocksize = 32;
constexpr int64_t kMaxBlocksize = 4096;

// A sorted code book of up to 256 entries with what the nearest-entry search needs. See code_book.h.
struct CodeBook;

// A 4-bit code book. The code of a scaled value s is `lowest_code` plus the steps of all midpoints below s.
struct FourBitBook {
  float values[16];
  float midpoints[15];  // ascending, padded with infinity
  int32_t steps[15];    // difference between the codes on either side of a midpoint
  int32_t lowest_code;
  int32_t zero_code;
};

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
  const float* book;  // 256 entries
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

struct Gemm4bit {
  const float* x_TK;
  const uint8_t* packed;
  const float* absmax;
  const FourBitBook* book;
  int64_t blocksize;
  const float* bias_N;  // or null
  int64_t T, N, K;
  void* out_TN;
  Float dtype;
};

struct Int8Gemm {
  const int8_t* a_TK;
  const int8_t* b_NK;
  const float* a_scale_T;
  const float* b_scale_N;
  const float* bias_N;  // or null
  int64_t T, N, K;
  void* out_TN;
  Float dtype;
};

// The scalars of an AdamW step, derived once in double.
struct AdamW {
  float decay;  // 1 - lr * weight_decay
  float lr;
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float eps;
  float correction1;       // 1 / (1 - beta1^t)
  float sqrt_correction2;  // 1 / sqrt(1 - beta2^t)
};

struct AdamW8bit {
  void* param;
  const void* grad;
  Float dtype;
  int64_t numel;
  int64_t blocksize;
  uint8_t* codes1;
  uint8_t* codes2;
  float* absmax1;
  float* absmax2;
  const CodeBook* book1;
  const CodeBook* book2;
};

struct AdamW32bit {
  void* param;
  const void* grad;
  Float dtype;
  int64_t numel;
  float* state1;
  float* state2;
};

struct Kernels {
  const char* name;     // as in Q_CPU_ISA
  const char* display;  // as people write it

  // Ranges of blocks.
  void (*quantize_blockwise)(const QuantizeBlockwise&, int64_t first, int64_t last);
  void (*dequantize_blockwise)(const DequantizeBlockwise&, int64_t first, int64_t last);
  void (*quantize_4bit)(const Quantize4bit&, int64_t first, int64_t last);
  void (*dequantize_4bit)(const Dequantize4bit&, int64_t first, int64_t last);
  // Ranges of columns, of all tokens; then, with the outlier columns known, ranges of tokens.
  void (*find_outlier_columns)(const QuantizeInt8Rowwise&, int64_t first, int64_t last);
  void (*quantize_int8_rowwise)(const QuantizeInt8Rowwise&, int64_t first, int64_t last);
  // Ranges of out features.
  void (*gemm_4bit)(const Gemm4bit&, int64_t first, int64_t last);
  void (*int8_gemm)(const Int8Gemm&, int64_t first, int64_t last);
  // Ranges of blocks, and of elements.
  void (*adamw_8bit)(const AdamW8bit&, const AdamW&, int64_t first, int64_t last);
  void (*adamw_32bit)(const AdamW32bit&, const AdamW&, int64_t first, int64_t last);
};

}  // namespace q_cpu
