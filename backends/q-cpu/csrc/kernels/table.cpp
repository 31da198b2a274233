// The table of one ISA level.

#include "kernels.h"
#include "level.h"

namespace q_cpu::Q_CPU_LEVEL {

extern const QuantizeKernels quantize_kernels;
extern const GemmKernels gemm_kernels;
extern const OptimKernels optim_kernels;
extern const Int8Kernels int8_kernels;
extern const AttentionKernels attention_kernels;
extern const NormKernels norm_kernels;
extern const MoeKernels moe_kernels;

extern const Kernels table;
const Kernels table = {
    Q_CPU_LEVEL_NAME, Q_CPU_LEVEL_DISPLAY, &quantize_kernels, &gemm_kernels, &optim_kernels,
    &int8_kernels,    &attention_kernels,  &norm_kernels,     &moe_kernels,
};

}  // namespace q_cpu::Q_CPU_LEVEL
