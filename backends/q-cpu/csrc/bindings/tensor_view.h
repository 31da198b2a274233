// A torch tensor as the kernels need it, checked.
//
// Tensors are read through torch's DLPack C exchange API where torch has it, and through their Python attributes where not; nothing
// outside tensor_view.cpp knows which. A view borrows: it holds for the call only.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "kernels.h"

namespace q_cpu {

namespace py = pybind11;

enum class Scalar : uint8_t { f32, bf16, f16, u8, i8, boolean, other };

// Which argument a message is about.
struct Argument {
  const char* op;
  const char* name;
  int64_t index = -1;  // in a list of tensors

  std::string text() const;
};

// Throw "<op>: <argument> <problem>".
[[noreturn]] void bad_value(const Argument& argument, const std::string& problem);
[[noreturn]] void bad_type(const Argument& argument, const std::string& problem);

class TensorView {
 public:
  // Any CPU tensor that is contiguous and aligned; what else it must be, the checks below say.
  TensorView(py::handle object, const Argument& argument);

  // Each check returns the view, or throws what was got and what expected.
  const TensorView& of(Scalar expected) const;
  const TensorView& of(const TensorView& other) const;
  const TensorView& floating() const;
  const TensorView& sized(int64_t expected) const;

  Scalar scalar() const { return scalar_; }
  Float dtype() const;  // of a floating view
  int64_t numel() const { return numel_; }

  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }

 private:
  void read_exchanged(py::handle object);
  void read_attributes(py::handle object);
  void set_layout(int64_t ndim, const int64_t* shape, const int64_t* strides);

  Argument argument_;
  void* data_ = nullptr;
  int64_t numel_ = 1;
  bool contiguous_ = true;
  Scalar scalar_ = Scalar::other;
  std::string foreign_dtype_;  // the name of a dtype that no kernel takes
};

// Blocks of a tensor of `numel` elements; checks the block size.
int64_t count_blocks(const char* op, int64_t numel, int64_t blocksize, int64_t smallest = kMinBlocksize);

// Product of two sizes given by the caller, which must not overflow or be negative.
int64_t checked_product(const char* op, int64_t a, int64_t b);

// Chooses how tensors are read, for tests: false for Python attributes even where torch has the exchange API. Tells whether it is
// used.
bool use_exchange_api(bool wanted);

}  // namespace q_cpu
