// Optimizer steps, each one pass over memory.

#include "optim.h"

#include "blocks.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int64_t kRun = 1024;  // elements of a 32-bit step taken at a time when they need converting

// Where the first moment is zero the parameter only decays, also with eps 0, where the quotient would be 0 / 0.
inline float adamw_parameter(float param, float m, float v, const AdamW& rule) {
  const float denominator = __builtin_sqrtf(v) * rule.sqrt_correction2 + rule.eps;
  const float step = rule.lr * (m * rule.correction1 / denominator);
  return param * rule.decay - (m == 0.0f ? 0.0f : step);
}

// Updates float32 parameters and states in place.
inline void adamw_block(float* param, const float* grad, float* __restrict m, float* __restrict v, int64_t count,
                        const AdamW& rule) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = grad[i];
    m[i] = rule.beta1 * m[i] + rule.one_minus_beta1 * g;
    v[i] = rule.beta2 * v[i] + rule.one_minus_beta2 * (g * g);
    param[i] = adamw_parameter(param[i], m[i], v[i], rule);
  }
}

// The same, but an element with a non-finite gradient keeps its value and its states.
inline void adamw_run(float* param, const float* grad, float* __restrict m, float* __restrict v, int64_t count, const AdamW& rule) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = grad[i];
    const bool finite = (bits_of(g) & kMagnitude) < kInfinity;
    const float new_m = rule.beta1 * m[i] + rule.one_minus_beta1 * g;
    const float new_v = rule.beta2 * v[i] + rule.one_minus_beta2 * (g * g);
    const float new_param = adamw_parameter(param[i], new_m, new_v, rule);
    m[i] = finite ? new_m : m[i];
    v[i] = finite ? new_v : v[i];
    param[i] = finite ? new_param : param[i];
  }
}

// A float32 view of parameters that may be written: themselves, or a copy in the buffer.
inline float* load_parameters(void* data, Float dtype, int64_t first, int64_t count, float* buffer) {
  load(data, dtype, first, count, buffer);
  return destination(data, dtype, first, buffer);
}

void adamw_8bit(const AdamW8bit& a, const AdamW& rule, int64_t first, int64_t last) {
  float param_buffer[kMaxBlocksize];
  float grad_buffer[kMaxBlocksize];
  float m[kMaxBlocksize];
  float v[kMaxBlocksize];
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * a.blocksize;
    const int64_t count = smaller(a.blocksize, a.numel - begin);
    const float* grad = load(a.grad, a.dtype, begin, count, grad_buffer);
    if (absmax_bits(grad, count) >= kInfinity) continue;

    decode_block(a.codes1 + begin, count, a.book1->values, a.absmax1[block], m);
    decode_block(a.codes2 + begin, count, a.book2->values, a.absmax2[block], v);
    float* param = load_parameters(a.param, a.dtype, begin, count, param_buffer);
    adamw_block(param, grad, m, v, count, rule);
    store(param, count, a.param, a.dtype, begin);
    a.absmax1[block] = encode_block(m, count, *a.book1, a.codes1 + begin);
    a.absmax2[block] = encode_block(v, count, *a.book2, a.codes2 + begin);
  }
}

void adamw_32bit(const AdamW32bit& a, const AdamW& rule, int64_t first, int64_t last) {
  float param_buffer[kRun];
  float grad_buffer[kRun];
  for (int64_t begin = first; begin < last; begin += kRun) {
    const int64_t count = smaller(kRun, last - begin);
    const float* grad = load(a.grad, a.dtype, begin, count, grad_buffer);
    float* param = load_parameters(a.param, a.dtype, begin, count, param_buffer);
    adamw_run(param, grad, a.state1 + begin, a.state2 + begin, count, rule);
    store(param, count, a.param, a.dtype, begin);
  }
}

}  // namespace

extern const OptimKernels optim_kernels;
const OptimKernels optim_kernels = {adamw_8bit, adamw_32bit};

}  // namespace q_cpu::Q_CPU_LEVEL
