// Optimizer steps.

#pragma once

#include "code_book.h"
#include "kernels.h"

namespace q_cpu {

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

struct OptimKernels {
  // Ranges of blocks, and of elements.
  void (*adamw_8bit)(const AdamW8bit&, const AdamW&, int64_t first, int64_t last);
  void (*adamw_32bit)(const AdamW32bit&, const AdamW&, int64_t first, int64_t last);
};

}  // namespace q_cpu
