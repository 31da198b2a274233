// The parts of the module, a file each.

#pragma once

#include <pybind11/pybind11.h>

namespace q_cpu {

void bind_quantize(pybind11::module_& module);
void bind_gemm(pybind11::module_& module);
void bind_optim(pybind11::module_& module);
void bind_int8(pybind11::module_& module);
void bind_attention(pybind11::module_& module);
void bind_norm(pybind11::module_& module);
void bind_moe(pybind11::module_& module);

}  // namespace q_cpu
