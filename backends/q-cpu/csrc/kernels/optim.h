// Optimizer steps: every rule, with states of 8 or 32 bits.

#pragma once

#include "code_book.h"
#include "kernels.h"

namespace q_cpu {

enum class OptimizerRule : uint8_t { adam, adamw, ademamix, lion, sgd, rmsprop, adagrad, lamb, lars };

constexpr int kMaxStates = 3;  // a first moment, a second one, and another first one, as far as a rule keeps them

// The settings of a step, derived once in double. Letters as in q_core.ops.optim.
struct OptimizerSettings {
  OptimizerRule rule;
  bool momentum;    // beta1 is not 0
  bool first_step;  // step is 1
  bool nesterov;
  float lr;
  float decay;  // 1 - lr * weight_decay
  float weight_decay;
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float beta3, one_minus_beta3;
  float eps;              // not 0, so that zero over zero is zero
  float one_corrected;    // sqrt(1 - beta2^t) / (1 - beta1^t)
  float lr_corrected;     // lr times that
  float alpha_corrected;  // lr * alpha * sqrt(1 - beta2^t)
  float eps_corrected;    // eps * sqrt(1 - beta2^t), not 0
  float one_minus_dampening;
};

// Elements of a unit where the states have 32 bits; in 8 bits a unit is a block.
constexpr int64_t kOptimizerRun = 1024;

struct OptimizerTensor {
  void* param;
  const void* grad;
  Float dtype;
  int64_t numel;
  int64_t unit;       // elements of a unit
  float trust_ratio;  // of lamb and lars
  // States of 32 bits; those that the rule doesn't keep are null.
  float* states[kMaxStates];
  // States of 8 bits: codes, scales and books.
  uint8_t* codes[kMaxStates];
  float* absmax[kMaxStates];
  const CodeBook* books[kMaxStates];
};

// What a trust ratio is made from: sums of squares over some units.
struct OptimizerNorms {
  double params;
  double updates;  // lamb's updates, or lars's gradients
  bool finite;     // the gradients are
};

struct OptimKernels {
  // Ranges of units. They return how many elements a non-finite gradient left as they were.
  int64_t (*step_8bit)(const OptimizerTensor&, const OptimizerSettings&, int64_t first, int64_t last);
  int64_t (*step_32bit)(const OptimizerTensor&, const OptimizerSettings&, int64_t first, int64_t last);
  // Of lamb and lars, to be known of all units before the step.
  OptimizerNorms (*norms_8bit)(const OptimizerTensor&, const OptimizerSettings&, int64_t first, int64_t last);
  OptimizerNorms (*norms_32bit)(const OptimizerTensor&, const OptimizerSettings&, int64_t first, int64_t last);
};

}  // namespace q_cpu
