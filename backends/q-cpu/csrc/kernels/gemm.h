// Matrix products with quantized weights. Letters: T tokens, N out features, K in features.

#pragma once

#include "code_book.h"
#include "kernels.h"

namespace q_cpu {

struct Gemm {
  const void* x_TK;
  const void* w_NK;
  const void* bias_N;  // or null
  int64_t T, N, K;     // N: from token to token in `out`; which rows of w there are, the range says
  void* out_TN;
  Float dtype;  // of x, w and bias
  Float out_dtype;
};

struct Gemm4bit {
  const void* x_TK;
  const uint8_t* packed;
  const float* absmax;
  const FourBitBook* book;
  int64_t blocksize;
  const void* bias_N;  // or null
  int64_t T, N, K;
  void* out_TN;
  Float dtype;  // of x and bias
  Float out_dtype;
};

struct GemmKernels {
  // Ranges of out features.
  void (*gemm_4bit)(const Gemm4bit&, int64_t first, int64_t last);
  void (*gemm)(const Gemm&, int64_t first, int64_t last);
};

}  // namespace q_cpu
