// The table of one ISA level.

#include "gemm.h"
#include "optim.h"
#include "quantize.h"

namespace q_cpu::Q_CPU_LEVEL {

extern const Kernels table;
const Kernels table = {
    Q_CPU_LEVEL_NAME, Q_CPU_LEVEL_DISPLAY, quantize_blockwise,   dequantize_blockwise,
    quantize_4bit,    dequantize_4bit,     find_outlier_columns, quantize_int8_rowwise,
    gemm_4bit,        int8_gemm,           adamw_8bit,           adamw_32bit,
};

}  // namespace q_cpu::Q_CPU_LEVEL
