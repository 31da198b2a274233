// Around the experts' products: the router's choice, and bringing tokens to experts and back.

#include "moe.h"

#include "vector_math.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int64_t kRun = 256;  // elements that are converted at a time

// Of the experts not taken yet the one with the largest logit, of equal ones the first. NaN counts as larger than all.
inline int64_t best_expert(const float* logits, const uint8_t* taken, int64_t E) {
  int64_t best = -1;
  for (int64_t e = 0; e < E; ++e) {
    if (taken[e]) continue;
    if (best < 0 || logits[e] > logits[best] || (logits[e] != logits[e] && logits[best] == logits[best])) best = e;
  }
  return best;
}

// The sum of e^(logit - largest).
inline float sum_of_powers(const float* logits, int64_t E, float largest) {
  Vector sums = {};
  float rest = 0.0f;
  int64_t e = 0;
  for (; e + kLanes <= E; e += kLanes) sums += exp_lanes(load_vector(logits + e) - largest);
  for (; e < E; ++e) rest += exp_lanes(broadcast(logits[e] - largest))[0];
  return sum_lanes(sums) + rest;
}

// `taken` is zero before and after.
void route_token(const RouteTopk& a, int64_t t, float* logits, uint8_t* taken) {
  const float* x = load(a.logits_TE, a.dtype, t * a.E, a.E, logits);
  float* weights = a.weights_Tk + t * a.k;
  int32_t* ids = a.ids_Tk + t * a.k;
  bool all_numbers = true;
  for (int64_t e = 0; e < a.E; ++e) all_numbers &= x[e] == x[e];
  for (int64_t j = 0; j < a.k; ++j) {
    const int64_t best = best_expert(x, taken, a.E);
    taken[best] = 1;
    ids[j] = static_cast<int32_t>(best);
  }
  for (int64_t j = 0; j < a.k; ++j) taken[ids[j]] = 0;
  const float largest = x[ids[0]];
  const float whole = a.sigmoid ? 1.0f : sum_of_powers(x, a.E, largest);
  float sum = 0.0f;
  for (int64_t j = 0; j < a.k; ++j) {
    const float logit = x[ids[j]];
    weights[j] = a.sigmoid ? sigmoid_lanes(broadcast(logit))[0] : exp_lanes(broadcast(logit - largest))[0] / whole;
    sum += weights[j];
  }
  for (int64_t j = 0; j < a.k; ++j) {
    if (a.renormalize) weights[j] /= sum;
    if (!all_numbers) weights[j] = from_bits(kNaN);
  }
}

void route_topk(const RouteTopk& a, int64_t first, int64_t last) {
  float logits[kMaxExperts];
  uint8_t taken[kMaxExperts] = {};
  for (int64_t t = first; t < last; ++t) route_token(a, t, logits, taken);
}

void decode_fp8(const DecodeFp8& a, int64_t first, int64_t last) {
  float run[kRun];
  for (int64_t row = first; row < last; ++row) {
    const E4m3* codes = reinterpret_cast<const E4m3*>(a.codes_NK) + row * a.K;
    const float scale = a.absmax_N[row] / 448.0f;
    for (int64_t k = 0; k < a.K; k += kRun) {
      const int64_t count = smaller(kRun, a.K - k);
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) write(read(codes + k + i) * scale, run + i);
      if (i < count) {
        const Vector rest = read_part(codes + k + i, count - i) * scale;
        memcpy(run + i, &rest, static_cast<size_t>(count - i) * sizeof(float));
      }
      store(run, count, a.out_NK, a.dtype, row * a.K + k);
    }
  }
}

void gather_tokens(const GatherTokens& a, int64_t first, int64_t last) {
  const char* x = static_cast<const char*>(a.x_TK);
  char* out = static_cast<char*>(a.out_PK);
  for (int64_t p = first; p < last; ++p) {
    memcpy(out + p * a.row_bytes, x + a.tokens_P[p] * a.row_bytes, static_cast<size_t>(a.row_bytes));
  }
}

// A token's results are summed in the order of its pairs, by expert, however they are cut into runs and columns.
void add_weighted(const AddWeighted& a, int64_t first, int64_t last) {
  for (int64_t p = 0; p < a.P; ++p) {
    const float weight = a.weights_P[p];
    const float* result = a.results_PK + p * a.K;
    float* sums = a.sums_TK + a.tokens_P[p] * a.K;
    for (int64_t k = first; k < last; ++k) sums[k] += weight * result[k];
  }
}

void round_sums(const RoundSums& a, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += kRun) store(a.sums + i, smaller(kRun, last - i), a.out, a.dtype, i);
}

}  // namespace

extern const MoeKernels moe_kernels;
const MoeKernels moe_kernels = {route_topk, decode_fp8, gather_tokens, add_weighted, round_sums};

}  // namespace q_cpu::Q_CPU_LEVEL
