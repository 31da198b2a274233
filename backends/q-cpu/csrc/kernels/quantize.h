// The kernels of quantize.cpp, in the level's namespace.

#pragma once

#include "kernels.h"
#include "level.h"

namespace q_cpu::Q_CPU_LEVEL {

void quantize_blockwise(const QuantizeBlockwise& a, int64_t first, int64_t last);
void dequantize_blockwise(const DequantizeBlockwise& a, int64_t first, int64_t last);
void quantize_4bit(const Quantize4bit& a, int64_t first, int64_t last);
void dequantize_4bit(const Dequantize4bit& a, int64_t first, int64_t last);
void find_outlier_columns(const QuantizeInt8Rowwise& a, int64_t first, int64_t last);
void quantize_int8_rowwise(const QuantizeInt8Rowwise& a, int64_t first, int64_t last);

}  // namespace q_cpu::Q_CPU_LEVEL
