// The kernels of gemm.cpp, in the level's namespace.

#pragma once

#include "kernels.h"
#include "level.h"

namespace q_cpu::Q_CPU_LEVEL {

void gemm_4bit(const Gemm4bit& a, int64_t first, int64_t last);
void int8_gemm(const Int8Gemm& a, int64_t first, int64_t last);

}  // namespace q_cpu::Q_CPU_LEVEL
