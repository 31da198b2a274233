// Matrix products with int8: of int8 rows with int8 rows, of floats with int8 weights, and of int8 rows with 4-bit weights.
// Letters: T tokens, N out features, K in features.

#pragma once

#include "kernels.h"

namespace q_cpu {

constexpr int64_t kMaxInt8K = 131071;  // int32 holds the sum of so many products, of -128 with -128 too

// Out features that the kernels of many tokens, and those of few, like to get a multiple of.
constexpr int64_t kManyTokensRows = 64;
constexpr int64_t kFewTokensRows = 8;
constexpr int64_t kFewTokens = 4;

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

struct GemmInt8Weight {
  const void* x_TK;
  const int8_t* w_NK;
  const float* w_scale_N;
  const float* bias_N;  // or null
  int64_t T, N, K;
  void* out_TN;
  Float dtype;  // of x
  Float out_dtype;
};

// The values of a 4-bit book as integers: values[code] * unit, exactly where the book allows it, else rounded to 127ths.
struct Int8Book {
  int8_t values[16];
  float unit;
};

// Activations are int8 rows, with the sums of their codes over the spans that weights share a scale in.
struct Gemm4bitInt8 {
  const int8_t* x_TK;
  const float* x_absmax_T;
  int32_t* span_sums;  // [T, K / span], if K is a multiple of the blocksize; else null
  const uint8_t* packed;
  const float* absmax;
  const Int8Book* book;
  int64_t blocksize;
  int64_t span;         // the blocksize, or a part of it
  const float* bias_N;  // or null
  int64_t T, N, K;
  void* out_TN;
  Float dtype;
};

constexpr int64_t kMaxSpan = 256;

struct Int8Kernels {
  // Ranges of out features.
  void (*int8_gemm)(const Int8Gemm&, int64_t first, int64_t last);
  void (*gemm_int8_weight)(const GemmInt8Weight&, int64_t first, int64_t last);
  void (*gemm_4bit_int8)(const Gemm4bitInt8&, int64_t first, int64_t last);
  // Ranges of tokens, before gemm_4bit_int8.
  void (*sum_spans)(const Gemm4bitInt8&, int64_t first, int64_t last);
};

}  // namespace q_cpu
