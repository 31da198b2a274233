// The ISA levels that were built, and which of them this machine can run.

#pragma once

#include "kernels.h"

namespace q_cpu {

struct Level {
  const Kernels* kernels;
  bool supported;  // by the processor and by the operating system
};

constexpr int kMaxLevels = 3;

// Fills `levels` from the plainest to the widest; returns how many were built.
int find_levels(Level levels[kMaxLevels]);

}  // namespace q_cpu
