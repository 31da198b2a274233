// Matrix products with quantized weights. Letters: T tokens, N out features, K in features.

#pragma once

#include "code_book.h"
#include "kernels.h"

namespace q_cpu {

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

struct GemmKernels {
  // Ranges of out features.
  void (*gemm_4bit)(const Gemm4bit&, int64_t first, int64_t last);
};

}  // namespace q_cpu
