#include "tensor_view.h"

#include <algorithm>
#include <vector>

#include "dlpack_abi.h"

namespace q_cpu {

namespace {

// What is asked of torch once: its tensor type, and its exchange API if it has one of a version known here.
struct Torch {
  PyTypeObject* tensor_type;
  const dlpack::ExchangeApi* api;

  Torch() {
    const py::object type = py::module_::import("torch").attr("Tensor");
    tensor_type = reinterpret_cast<PyTypeObject*>(py::object(type).release().ptr());  // kept for the life of the process
    api = nullptr;
    if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return;
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    void* table = PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName);
    if (table == nullptr) throw py::error_already_set();
    const auto* header = static_cast<const dlpack::ExchangeApiHeader*>(table);
    while (header != nullptr && header->major > dlpack::kMajorVersion) header = header->previous;
    if (header == nullptr || header->major != dlpack::kMajorVersion) return;
    const auto* candidate = reinterpret_cast<const dlpack::ExchangeApi*>(header);
    if (candidate->tensor_from_py_object_no_sync != nullptr) api = candidate;
  }
};

const Torch& torch() {
  static const Torch instance;
  return instance;
}

bool exchange_wanted = true;

bool exchange_used() { return exchange_wanted && torch().api != nullptr; }

struct ScalarFacts {
  Scalar scalar;
  const char* name;
  uint8_t code;
  uint8_t bits;
};

constexpr ScalarFacts kScalars[] = {
    {Scalar::f32, "float32", dlpack::kFloat, 32}, {Scalar::bf16, "bfloat16", dlpack::kBfloat, 16},
    {Scalar::f16, "float16", dlpack::kFloat, 16}, {Scalar::u8, "uint8", dlpack::kUInt, 8},
    {Scalar::i8, "int8", dlpack::kInt, 8},        {Scalar::boolean, "bool", dlpack::kBool, 8},
    {Scalar::i32, "int32", dlpack::kInt, 32},     {Scalar::i64, "int64", dlpack::kInt, 64},
};

const ScalarFacts& facts(Scalar scalar) { return kScalars[static_cast<size_t>(scalar)]; }

std::string quoted_type(py::handle object) { return py::str(py::type::handle_of(object).attr("__name__")); }

}  // namespace

std::string Argument::text() const {
  std::string out = std::string(op) + ": " + name;
  if (index >= 0) out += "[" + std::to_string(index) + "]";
  return out;
}

void bad_value(const Argument& argument, const std::string& problem) { throw py::value_error(argument.text() + " " + problem); }

void bad_type(const Argument& argument, const std::string& problem) { throw py::type_error(argument.text() + " " + problem); }

TensorView::TensorView(py::handle object, const Argument& argument, Layout layout) : argument_(argument) {
  // The exchange functions trust the type, so it is asked for first.
  if (!PyObject_TypeCheck(object.ptr(), torch().tensor_type))
    bad_type(argument_, "is a " + quoted_type(object) + ", expected a torch.Tensor");
  if (exchange_used()) {
    read_exchanged(object);
  } else {
    read_attributes(object);
  }
  if (layout == Layout::contiguous && !contiguous_) bad_value(argument_, "is not contiguous; pass a contiguous copy");
  if (scalar_ == Scalar::other || numel_ == 0) return;
  if (data_ == nullptr) bad_value(argument_, "has no storage, expected a dense CPU tensor");
  if (reinterpret_cast<uintptr_t>(data_) % (facts(scalar_).bits / 8) != 0) {
    bad_value(argument_, std::string("is not aligned to its dtype ") + facts(scalar_).name + "; pass a clone");
  }
}

void TensorView::read_exchanged(py::handle object) {
  dlpack::Tensor tensor;
  if (torch().api->tensor_from_py_object_no_sync(object.ptr(), &tensor) != 0) {
    py::error_already_set cause;
    py::raise_from(cause, PyExc_TypeError, (argument_.text() + " can't be read, expected a dense CPU tensor").c_str());
    throw py::error_already_set();
  }
  if (tensor.device.type != dlpack::kCPU) {
    bad_value(argument_, "is on " + std::string(py::str(object.attr("device"))) + ", expected a CPU tensor");
  }
  for (const ScalarFacts& candidate : kScalars) {
    if (tensor.dtype.code == candidate.code && tensor.dtype.bits == candidate.bits && tensor.dtype.lanes == 1)
      scalar_ = candidate.scalar;
  }
  if (scalar_ == Scalar::other) foreign_dtype_ = py::str(object.attr("dtype"));
  set_layout(tensor.ndim, tensor.shape, tensor.strides);
  data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
}

void TensorView::read_attributes(py::handle object) {
  const std::string device = py::str(object.attr("device").attr("type"));
  if (device != "cpu") bad_value(argument_, "is on " + device + ", expected a CPU tensor");
  if (std::string(py::str(object.attr("layout"))) != "torch.strided")
    bad_type(argument_, "can't be read, expected a dense CPU tensor");
  foreign_dtype_ = py::str(object.attr("dtype"));
  for (const ScalarFacts& candidate : kScalars) {
    if (foreign_dtype_ == std::string("torch.") + candidate.name) scalar_ = candidate.scalar;
  }
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  for (const py::handle size : object.attr("shape")) shape.push_back(size.cast<int64_t>());
  for (const py::handle stride : object.attr("stride")()) strides.push_back(stride.cast<int64_t>());
  set_layout(static_cast<int64_t>(shape.size()), shape.data(), strides.data());
  data_ = reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>());
}

void TensorView::set_layout(int64_t ndim, const int64_t* shape, const int64_t* strides) {
  axes_ = ndim;
  for (int64_t axis = 0; axis < std::min<int64_t>(ndim, kMaxStridedAxes); ++axis) {
    sizes_[axis] = shape[axis];
    strides_[axis] = strides[axis];
  }
  for (int64_t axis = ndim - 1; axis >= 0; --axis) {
    if (shape[axis] != 1 && strides[axis] != numel_) contiguous_ = false;
    numel_ *= shape[axis];
  }
  if (numel_ == 0) contiguous_ = true;
}

const TensorView& TensorView::of(Scalar expected) const {
  if (scalar_ != expected) {
    const std::string got = scalar_ == Scalar::other ? foreign_dtype_ : facts(scalar_).name;
    bad_type(argument_, "has dtype " + got + ", expected " + facts(expected).name);
  }
  return *this;
}

const TensorView& TensorView::of(const TensorView& other) const { return of(other.scalar_); }

const TensorView& TensorView::floating() const {
  if (scalar_ > Scalar::f16) {
    const std::string got = scalar_ == Scalar::other ? foreign_dtype_ : facts(scalar_).name;
    bad_type(argument_, "has dtype " + got + ", expected float32, bfloat16 or float16");
  }
  return *this;
}

const TensorView& TensorView::sized(int64_t expected) const {
  if (numel_ != expected) bad_value(argument_, "has " + std::to_string(numel_) + " elements, expected " + std::to_string(expected));
  return *this;
}

const TensorView& TensorView::shaped(std::initializer_list<int64_t> expected) const {
  const int64_t axes = static_cast<int64_t>(expected.size());
  if (axes_ != axes) bad_value(argument_, "has " + std::to_string(axes_) + " axes, expected " + std::to_string(axes));
  int64_t axis = 0;
  for (const int64_t size : expected) {
    if (sizes_[axis] != size) {
      const std::string got = "has " + std::to_string(sizes_[axis]) + " elements on axis " + std::to_string(axis);
      bad_value(argument_, got + ", expected " + std::to_string(size));
    }
    ++axis;
  }
  if (numel_ > 0 && sizes_[axes - 1] > 1 && strides_[axes - 1] != 1) {
    bad_value(argument_, "has a last axis that is not contiguous; pass a contiguous copy");
  }
  return *this;
}

Float TensorView::dtype() const {
  static_assert(static_cast<int>(Scalar::f32) == static_cast<int>(Float::f32) &&
                static_cast<int>(Scalar::bf16) == static_cast<int>(Float::bf16) &&
                static_cast<int>(Scalar::f16) == static_cast<int>(Float::f16));
  return static_cast<Float>(floating().scalar_);
}

int64_t count_blocks(const char* op, int64_t numel, int64_t blocksize, int64_t smallest) {
  if (blocksize < smallest || blocksize > kMaxBlocksize || (blocksize & (blocksize - 1)) != 0) {
    bad_value({op, "blocksize"}, "is " + std::to_string(blocksize) + ", expected a power of two in " + std::to_string(smallest) +
                                     "…" + std::to_string(kMaxBlocksize));
  }
  return numel / blocksize + (numel % blocksize != 0);  // of sizes that no tensor has yet been seen to have
}

int64_t checked_product(const char* op, int64_t a, int64_t b) {
  int64_t product;
  if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product)) {
    bad_value({op, "shape"}, "has the sizes " + std::to_string(a) + " and " + std::to_string(b) + ", expected a tensor's");
  }
  return product;
}

bool use_exchange_api(bool wanted) {
  exchange_wanted = wanted;
  return exchange_used();
}

}  // namespace q_cpu
