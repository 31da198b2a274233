// Optimizer steps, each one pass over memory: a unit's states are decoded, updated with its parameters, and encoded while in L1.
// lamb and lars have a pass before it, which sums what their trust ratios are made from and writes nothing.

#include "optim.h"

#include "blocks.h"
#include "optim_rules.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

// Blocks are taken so many at a time that their scales, each found by a long chain of dependent steps, are found side by side.
constexpr int64_t kElementsAtOnce = 512;
constexpr int64_t kMostAtOnce = kElementsAtOnce / kMinBlocksize;

// How far ahead gradients and parameters are fetched: gradients while they are looked through, parameters while states are encoded,
// so that memory has work all the time.
constexpr int64_t kElementsAhead = 1280;
constexpr int64_t kLine = 64 / sizeof(float);

// Apart by other than a power of two: at equal addresses modulo 4096 a load waits for another's store.
constexpr int64_t kBuffer = kMaxBlocksize + 80;

struct Buffers {
  alignas(64) float param[kBuffer];
  alignas(64) float grad[kBuffer];
  alignas(64) float states[kMaxStates][kBuffer];
};

// A unit in float32: in place where it is, else in the buffers.
struct Unit {
  int64_t begin, count;
  float* param;
  const float* grad;
  float* states[kMaxStates];
};

template <class Rule>
constexpr bool keeps(int state) {
  return state == 0 ? Rule::kKept.m : state == 1 ? Rule::kKept.v : Rule::kKept.slow;
}

enum class Bits { eight, thirty_two };

// Takes the buffers from `offset` on.
template <class Rule, Bits kBits>
inline Unit load_unit(const OptimizerTensor& a, int64_t index, Buffers& buffers, int64_t offset) {
  Unit unit;
  unit.begin = index * a.unit;
  unit.count = smaller(a.unit, a.numel - unit.begin);
  unit.grad = load(a.grad, a.dtype, unit.begin, unit.count, buffers.grad + offset);
  load(a.param, a.dtype, unit.begin, unit.count, buffers.param + offset);
  unit.param = destination(a.param, a.dtype, unit.begin, buffers.param + offset);
  for (int i = 0; i < kMaxStates; ++i) {
    if (!keeps<Rule>(i)) {
      unit.states[i] = nullptr;
    } else if (kBits == Bits::thirty_two) {
      unit.states[i] = a.states[i] + unit.begin;
    } else {
      unit.states[i] = buffers.states[i] + offset;
      decode_block(a.codes[i] + unit.begin, unit.count, a.books[i]->table, a.absmax[i][index], unit.states[i]);
    }
  }
  return unit;
}

struct Elements {
  Vector p, g;
  States s;
};

template <class Rule>
inline Elements load_elements(const Unit& unit, int64_t i) {
  Elements e{load_vector(unit.param + i), load_vector(unit.grad + i), {}};
  if (Rule::kKept.m) e.s.m = load_vector(unit.states[0] + i);
  if (Rule::kKept.v) e.s.v = load_vector(unit.states[1] + i);
  if (Rule::kKept.slow) e.s.slow = load_vector(unit.states[2] + i);
  return e;
}

// The last ones of a unit, fewer than a vector holds, zeros after them.
template <class Rule>
inline Elements load_last_elements(const Unit& unit, int64_t i) {
  const int64_t count = unit.count - i;
  Elements e{load_part(unit.param + i, count), load_part(unit.grad + i, count), {}};
  if (Rule::kKept.m) e.s.m = load_part(unit.states[0] + i, count);
  if (Rule::kKept.v) e.s.v = load_part(unit.states[1] + i, count);
  if (Rule::kKept.slow) e.s.slow = load_part(unit.states[2] + i, count);
  return e;
}

template <class Rule>
inline void store_elements(const Elements& e, const Unit& unit, int64_t i) {
  store_lanes(unit.param + i, e.p);
  if (Rule::kKept.m) store_lanes(unit.states[0] + i, e.s.m);
  if (Rule::kKept.v) store_lanes(unit.states[1] + i, e.s.v);
  if (Rule::kKept.slow) store_lanes(unit.states[2] + i, e.s.slow);
}

template <class Rule>
inline void store_last_elements(const Elements& e, const Unit& unit, int64_t i) {
  const int64_t count = unit.count - i;
  store_part(unit.param + i, e.p, count);
  if (Rule::kKept.m) store_part(unit.states[0] + i, e.s.m, count);
  if (Rule::kKept.v) store_part(unit.states[1] + i, e.s.v, count);
  if (Rule::kKept.slow) store_part(unit.states[2] + i, e.s.slow, count);
}

// Whether all elements are. Zero times one that isn't is NaN, which no sum loses.
inline bool are_finite(const float* x, int64_t count) {
  constexpr int kSums = 4;
  Vector sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= count; i += kSums * kLanes) {
    for (int64_t j = 0; j < kSums * kLanes; j += kLine) __builtin_prefetch(x + i + j + kElementsAhead);
    for (int j = 0; j < kSums; ++j) sums[j] = multiply_add(load_vector(x + i + j * kLanes), Vector{}, sums[j]);
  }
  for (; i < count; i += kLanes) {
    const Vector rest = i + kLanes <= count ? load_vector(x + i) : load_part(x + i, count - i);
    sums[0] = multiply_add(rest, Vector{}, sums[0]);
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) == 0.0f;
}

// Elements after the step; where `kBits` is 32, one with a non-finite gradient keeps its value and its states.
template <class Rule, Bits kBits>
inline Elements updated(const Elements& before, float trust_ratio, const Settings& h) {
  Elements after = before;
  after.p = Rule::update(before.p, before.g, after.s, trust_ratio, h);
  if (kBits == Bits::eight) return after;
  const Integers finite = magnitude_bits(before.g) < static_cast<int32_t>(kInfinity);
  after.p = finite ? after.p : before.p;
  if (Rule::kKept.m) after.s.m = finite ? after.s.m : before.s.m;
  if (Rule::kKept.v) after.s.v = finite ? after.s.v : before.s.v;
  if (Rule::kKept.slow) after.s.slow = finite ? after.s.slow : before.s.slow;
  return after;
}

// The largest magnitudes of the states, as bit patterns.
struct Largest {
  Integers m, v, slow;

  template <class Rule>
  void include(const States& s) {
    if (Rule::kKept.m) m = larger(m, magnitude_bits(s.m));
    if (Rule::kKept.v) v = larger(v, magnitude_bits(s.v));
    if (Rule::kKept.slow) slow = larger(slow, magnitude_bits(s.slow));
  }
};

template <class Rule, Bits kBits>
inline Largest update_unit(const Unit& unit, float trust_ratio, const Settings h) {
  Largest largest{};
  int64_t i = 0;
  for (; i + kLanes <= unit.count; i += kLanes) {
    const Elements e = updated<Rule, kBits>(load_elements<Rule>(unit, i), trust_ratio, h);
    store_elements<Rule>(e, unit, i);
    if (kBits == Bits::eight) largest.template include<Rule>(e.s);
  }
  if (i < unit.count) {
    const Elements e = updated<Rule, kBits>(load_last_elements<Rule>(unit, i), trust_ratio, h);
    store_last_elements<Rule>(e, unit, i);
    if (kBits == Bits::eight) largest.template include<Rule>(e.s);
  }
  return largest;
}

template <class Rule>
inline void encode_unit(const OptimizerTensor& a, int64_t index, const Unit& unit, const Largest& largest) {
  for (int64_t i = 0; i < unit.count; i += kLine) __builtin_prefetch(unit.param + i + kElementsAhead, 1);
  const Integers found[kMaxStates] = {largest.m, largest.v, largest.slow};
  for (int i = 0; i < kMaxStates; ++i) {
    if (!keeps<Rule>(i)) continue;
    a.absmax[i][index] = encode_block(unit.states[i], unit.count, largest_lane(found[i]), *a.books[i], a.codes[i] + unit.begin);
  }
}

int64_t count_non_finite(const float* x, int64_t count) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += !(__builtin_fabsf(x[i]) < __builtin_inff());
  return found;
}

template <class Rule, Bits kBits>
int64_t step(const OptimizerTensor& a, const Settings& h, int64_t first, int64_t last) {
  Buffers buffers;
  Unit units[kMostAtOnce];
  Largest largest[kMostAtOnce];
  bool finite[kMostAtOnce];
  int64_t skipped = 0;
  const int64_t at_once = a.unit < kElementsAtOnce ? kElementsAtOnce / a.unit : 1;
  for (int64_t index = first; index < last; index += at_once) {
    const int64_t count = smaller(at_once, last - index);
    for (int64_t i = 0; i < count; ++i) {
      const Unit& unit = units[i] = load_unit<Rule, kBits>(a, index + i, buffers, i * a.unit);
      finite[i] = are_finite(unit.grad, unit.count);
      if (!finite[i]) skipped += kBits == Bits::eight ? unit.count : count_non_finite(unit.grad, unit.count);
      if (!finite[i] && kBits == Bits::eight) continue;
      largest[i] = update_unit<Rule, kBits>(unit, a.trust_ratio, h);
      store(unit.param, unit.count, a.param, a.dtype, unit.begin);
    }
    if (kBits == Bits::thirty_two) continue;
    for (int64_t i = 0; i < count; ++i) {
      if (finite[i]) encode_unit<Rule>(a, index + i, units[i], largest[i]);
    }
  }
  return skipped;
}

template <class Rule, Bits kBits>
OptimizerNorms norms(const OptimizerTensor& a, const Settings& h, int64_t first, int64_t last) {
  Buffers buffers;
  OptimizerNorms sums{0, 0, true};
  for (int64_t index = first; index < last; ++index) {
    const Unit unit = load_unit<Rule, kBits>(a, index, buffers, 0);
    sums.finite &= are_finite(unit.grad, unit.count);
    Vector params = {}, updates = {};
    for (int64_t i = 0; i < unit.count; i += kLanes) {
      __builtin_prefetch(unit.param + i + kElementsAhead);
      Elements e = i + kLanes <= unit.count ? load_elements<Rule>(unit, i) : load_last_elements<Rule>(unit, i);
      const Vector measured = Rule::measured(e.p, e.g, e.s, h);
      params = multiply_add(e.p, e.p, params);
      updates = multiply_add(measured, measured, updates);
    }
    sums.params += static_cast<double>(sum_lanes(params));
    sums.updates += static_cast<double>(sum_lanes(updates));
  }
  return sums;
}

template <Bits kBits>
int64_t step_by_rule(const OptimizerTensor& a, const Settings& h, int64_t first, int64_t last) {
  switch (h.rule) {
    case OptimizerRule::adam:
      return step<Adam, kBits>(a, h, first, last);
    case OptimizerRule::adamw:
      return step<AdamW, kBits>(a, h, first, last);
    case OptimizerRule::ademamix:
      return step<AdEMAMix, kBits>(a, h, first, last);
    case OptimizerRule::lion:
      return step<Lion, kBits>(a, h, first, last);
    case OptimizerRule::sgd:
      return h.momentum ? step<SGD<true>, kBits>(a, h, first, last) : step<SGD<false>, kBits>(a, h, first, last);
    case OptimizerRule::rmsprop:
      return h.momentum ? step<RMSprop<true>, kBits>(a, h, first, last) : step<RMSprop<false>, kBits>(a, h, first, last);
    case OptimizerRule::adagrad:
      return step<Adagrad, kBits>(a, h, first, last);
    case OptimizerRule::lamb:
      return step<LAMB, kBits>(a, h, first, last);
    case OptimizerRule::lars:
      return h.momentum ? step<LARS<true>, kBits>(a, h, first, last) : step<LARS<false>, kBits>(a, h, first, last);
  }
  __builtin_unreachable();
}

// lars measures parameters and gradients, whatever states it keeps.
template <Bits kBits>
OptimizerNorms norms_by_rule(const OptimizerTensor& a, const Settings& h, int64_t first, int64_t last) {
  return h.rule == OptimizerRule::lamb ? norms<LAMB, kBits>(a, h, first, last) : norms<LARS<false>, kBits>(a, h, first, last);
}

}  // namespace

extern const OptimKernels optim_kernels;
const OptimKernels optim_kernels = {
    step_by_rule<Bits::eight>,
    step_by_rule<Bits::thirty_two>,
    norms_by_rule<Bits::eight>,
    norms_by_rule<Bits::thirty_two>,
};

}  // namespace q_cpu::Q_CPU_LEVEL
