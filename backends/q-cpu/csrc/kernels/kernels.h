// What all kernels share, and the table they are called through.
//
// A kernel knows pointers, sizes and strides only. It works on a half-open range of its units (blocks, rows, columns, elements),
// and the result of a unit depends on nothing but that unit's input, so any partition over threads gives the same bits.
//
// The kernel sources are compiled once an ISA level, each time into a namespace of its own; a `Kernels` table is all that a level
// exports. Its headers must stay free of inline functions and of std: what they defined would be compiled with AVX flags by one
// level and picked by the linker for another. The arguments of a family's kernels and its part of the table are in the family's
// header.

#pragma once

#include <stdint.h>

namespace q_cpu {

enum class Float : uint8_t { f32, bf16, f16 };

constexpr int64_t kMinBlocksize = 32;
constexpr int64_t kMinFourBitBlocksize = 16;
constexpr int64_t kMaxBlocksize = 4096;

struct QuantizeKernels;
struct GemmKernels;
struct OptimKernels;
struct Int8Kernels;
struct AttentionKernels;
struct NormKernels;
struct MoeKernels;

struct Kernels {
  const char* name;     // as in Q_CPU_ISA
  const char* display;  // as people write it
  const QuantizeKernels* quantize;
  const GemmKernels* gemm;
  const OptimKernels* optim;
  const Int8Kernels* int8;
  const AttentionKernels* attention;
  const NormKernels* norm;
  const MoeKernels* moe;
};

}  // namespace q_cpu
