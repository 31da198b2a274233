// The kernels of optim.cpp, in the level's namespace.

#pragma once

#include "kernels.h"
#include "level.h"

namespace q_cpu::Q_CPU_LEVEL {

void adamw_8bit(const AdamW8bit& a, const AdamW& rule, int64_t first, int64_t last);
void adamw_32bit(const AdamW32bit& a, const AdamW& rule, int64_t first, int64_t last);

}  // namespace q_cpu::Q_CPU_LEVEL
