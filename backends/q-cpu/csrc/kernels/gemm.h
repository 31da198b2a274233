// The kernels of gemm.cpp, in the level's namespace.

#pragma once

#include "kernels.h"
#include "level.h"

Q_CPU_LEVEL_BEGIN

void gemm_4bit(const Gemm4bit& a, int64_t first, int64_t last);
void int8_gemm(const Int8Gemm& a, int64_t first, int64_t last);

Q_CPU_LEVEL_END
