// The update rules of q_core.ops.optim, a struct each: which states it keeps, and what it makes of a vector of elements.
//
// States have the same bits at every level: no product and sum of theirs are fused. Those of parameters are, where the level can.
//
// `update` changes the states and returns the new parameters. Settings come by value: kept in registers, no store can change them.

#pragma once

#include "elementwise.h"
#include "optim.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

using Settings = OptimizerSettings;

struct States {
  Vector m;     // state1
  Vector v;     // state2
  Vector slow;  // state3
};

struct Kept {
  bool m, v, slow;
};

inline Vector average(Vector state, Vector value, float beta, float one_minus_beta) {
  return beta * state + one_minus_beta * value;
}

inline void adam_moments(Vector g, States& s, const Settings& h) {
  s.m = average(s.m, g, h.beta1, h.one_minus_beta1);
  s.v = average(s.v, g * g, h.beta2, h.one_minus_beta2);
}

// What is divided by it is (m / (1 - beta1^t)) / (sqrt(v) / sqrt(1 - beta2^t) + eps) and the like, with the corrections taken out
// of the elements' arithmetic, into the factors of the numerator.
inline Vector adam_denominator(const States& s, const Settings& h) { return square_root(s.v) + h.eps_corrected; }

inline Vector adam_step(const States& s, const Settings& h) { return s.m * h.lr_corrected / adam_denominator(s, h); }

// A parameter after its decay and a step.
inline Vector decayed(Vector p, Vector step, const Settings& h) { return multiply_add(p, broadcast(h.decay), -step); }

struct AdamW {
  static constexpr Kept kKept{true, true, false};
  static Vector update(Vector p, Vector g, States& s, float, const Settings& h) {
    adam_moments(g, s, h);
    return decayed(p, adam_step(s, h), h);
  }
};

struct Adam {
  static constexpr Kept kKept{true, true, false};
  static Vector update(Vector p, Vector g, States& s, float, const Settings& h) {
    adam_moments(g + h.weight_decay * p, s, h);
    return p - adam_step(s, h);
  }
};

struct AdEMAMix {
  static constexpr Kept kKept{true, true, true};
  static Vector update(Vector p, Vector g, States& s, float, const Settings& h) {
    adam_moments(g, s, h);
    s.slow = average(s.slow, g, h.beta3, h.one_minus_beta3);
    const Vector mixed = multiply_add(s.slow, broadcast(h.alpha_corrected), s.m * h.lr_corrected);
    return decayed(p, mixed / adam_denominator(s, h), h);
  }
};

struct Lion {
  static constexpr Kept kKept{true, false, false};
  static Vector update(Vector p, Vector g, States& s, float, const Settings& h) {
    const Vector direction = sign_of(average(s.m, g, h.beta1, h.one_minus_beta1));
    s.m = average(s.m, g, h.beta2, h.one_minus_beta2);
    return decayed(p, h.lr * direction, h);
  }
};

template <bool kMomentum>
inline Vector heavy_ball(Vector p, Vector g, States& s, const Settings& h) {
  if (!kMomentum) return p - h.lr * g;
  s.m = h.first_step ? g : h.beta1 * s.m + h.one_minus_dampening * g;
  return p - h.lr * (h.nesterov ? g + h.beta1 * s.m : s.m);
}

template <bool kMomentum>
struct SGD {
  static constexpr Kept kKept{kMomentum, false, false};
  static Vector update(Vector p, Vector g, States& s, float, const Settings& h) {
    return heavy_ball<kMomentum>(p, g + h.weight_decay * p, s, h);
  }
};

template <bool kMomentum>
struct RMSprop {
  static constexpr Kept kKept{kMomentum, true, false};
  static Vector update(Vector p, Vector g, States& s, float, const Settings& h) {
    g += h.weight_decay * p;
    s.v = average(s.v, g * g, h.beta2, h.one_minus_beta2);
    Vector step = g / (square_root(s.v) + h.eps);
    if (kMomentum) step = s.m = h.beta1 * s.m + step;
    return p - h.lr * step;
  }
};

struct Adagrad {
  static constexpr Kept kKept{false, true, false};
  static Vector update(Vector p, Vector g, States& s, float, const Settings& h) {
    g += h.weight_decay * p;
    s.v += g * g;
    return p - h.lr * (g / (square_root(s.v) + h.eps));
  }
};

// Rules with a trust ratio also say what its second norm is taken of.

struct LAMB {
  static constexpr Kept kKept{true, true, false};
  static Vector direction(Vector p, Vector g, States& s, const Settings& h) {
    adam_moments(g, s, h);
    return multiply_add(p, broadcast(h.weight_decay), s.m * h.one_corrected / adam_denominator(s, h));
  }
  static Vector measured(Vector p, Vector g, States& s, const Settings& h) { return direction(p, g, s, h); }
  static Vector update(Vector p, Vector g, States& s, float trust_ratio, const Settings& h) {
    return multiply_add(broadcast(-h.lr * trust_ratio), direction(p, g, s, h), p);
  }
};

template <bool kMomentum>
struct LARS {
  static constexpr Kept kKept{kMomentum, false, false};
  static Vector measured(Vector, Vector g, States&, const Settings&) { return g; }
  static Vector update(Vector p, Vector g, States& s, float trust_ratio, const Settings& h) {
    return heavy_ball<kMomentum>(p, (g + h.weight_decay * p) * trust_ratio, s, h);
  }
};

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
