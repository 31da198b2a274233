// What the bindings keep between calls: the ISA level in use, the 4-bit books, and the last code books seen.

#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "code_book.h"
#include "kernels.h"
#include "tensor_view.h"

namespace q_cpu {

// Kernels of the level in use: the widest that the machine supports, unless `set_isa` chose another.
const Kernels& kernels();
std::vector<std::string> available_isas();
void set_isa(const std::string& name);

// Makes a 4-bit book known by name: values by code, the codes in ascending order of value, and how scales are rounded.
void register_4bit(const std::string& quant_type, const std::vector<float>& values, const std::vector<int>& ordered,
                   const std::string& scale);
const FourBitBook& four_bit_book(const char* op, const std::string& quant_type, const char* argument = "quant_type");

// The search tables of a code-book tensor. Building them takes microseconds, so the last few are kept, found again by their values.
std::shared_ptr<const CodeBook> code_book(const Argument& argument, py::handle tensor);

}  // namespace q_cpu
