// Mixtures of experts: the router's choice, and what stands around the experts' products.
//
// Letters: T tokens, E experts, K features, k experts a token. A pair is a token and one of its experts; pairs are ordered by
// expert.

#pragma once

#include "kernels.h"

namespace q_cpu {

constexpr int64_t kMaxExperts = 1024;

struct RouteTopk {
  const void* logits_TE;
  Float dtype;
  int64_t T, E, k;  // E at most kMaxExperts
  bool sigmoid;     // else softmax
  bool renormalize;
  float* weights_Tk;
  int32_t* ids_Tk;
};

// float8_e4m3fn with one scale a row, to floats.
struct DecodeFp8 {
  const uint8_t* codes_NK;
  const float* absmax_N;
  int64_t K;
  void* out_NK;
  Float dtype;
};

struct GatherTokens {
  const void* x_TK;
  const int64_t* tokens_P;
  int64_t row_bytes;
  void* out_PK;
};

// Adds each pair's result, times its weight, to its token's sum.
struct AddWeighted {
  const float* results_PK;
  const int64_t* tokens_P;
  const float* weights_P;
  int64_t P, K;
  float* sums_TK;
};

struct RoundSums {
  const float* sums;
  void* out;
  Float dtype;
};

struct MoeKernels {
  // Ranges of tokens, of rows, of pairs, of columns, and of elements.
  void (*route_topk)(const RouteTopk&, int64_t first, int64_t last);
  void (*decode_fp8)(const DecodeFp8&, int64_t first, int64_t last);
  void (*gather_tokens)(const GatherTokens&, int64_t first, int64_t last);
  void (*add_weighted)(const AddWeighted&, int64_t first, int64_t last);
  void (*round_sums)(const RoundSums&, int64_t first, int64_t last);
};

}  // namespace q_cpu
