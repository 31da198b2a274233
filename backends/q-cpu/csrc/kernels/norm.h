// Norms, rotary embedding and gated activation. Letters: K features, N half of them, T tokens, H and G heads, D head dim, F pairs.

#pragma once

#include "kernels.h"

namespace q_cpu {

struct RmsNorm {
  const void* x;
  int64_t x_stride;      // elements from row to row
  const void* residual;  // or null: then total is not written
  int64_t residual_stride;
  const void* weight_K;
  float eps;
  int64_t T, K;
  void* total;  // rows one after the other, as in out
  void* out;
  Float dtype;
};

// The heads of one argument, by its strides in elements; the last axis is contiguous.
struct Heads {
  const void* in;
  int64_t token_stride;
  int64_t head_stride;
  int64_t count;
  void* out;  // contiguous
};

struct RotaryEmbedding {
  Heads q, k;
  const int64_t* positions_T;
  const float* cos_PF;
  const float* sin_PF;
  int64_t D, F;
  bool interleaved;
  Float dtype;
};

struct SiluAndMul {
  const void* x;
  int64_t x_stride;
  int64_t T, N;
  void* out;
  Float dtype;
};

struct NormKernels {
  // Ranges of rows, and of tokens.
  void (*rms_norm)(const RmsNorm&, int64_t first, int64_t last);
  void (*rotary_embedding)(const RotaryEmbedding&, int64_t first, int64_t last);
  void (*silu_and_mul)(const SiluAndMul&, int64_t first, int64_t last);
};

}  // namespace q_cpu
