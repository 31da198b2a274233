// The part of the DLPack ABI (major version 1) that is read here: the plain tensor, and the table of C functions that a framework
// puts on its tensor type as the capsule `__dlpack_c_exchange_api__`. Layouts as in the DLPack 1.2 specification,
// https://dmlc.github.io/dlpack/latest/c_api.html; the function pointers that aren't called are left untyped.

#pragma once

#include <cstdint>

namespace q_cpu::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";

constexpr int32_t kCPU = 1;

constexpr uint8_t kInt = 0;
constexpr uint8_t kUInt = 1;
constexpr uint8_t kFloat = 2;
constexpr uint8_t kBfloat = 4;
constexpr uint8_t kBool = 6;

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Device {
  int32_t type;
  int32_t id;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApiHeader {
  uint32_t major;
  uint32_t minor;
  const ExchangeApiHeader* previous;
};

struct ExchangeApi {
  ExchangeApiHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  // Fills a tensor that stays owned by the Python object. 0, or -1 with a Python exception set. May be null.
  int (*tensor_from_py_object_no_sync)(void* py_object, Tensor* out);
  void* current_work_stream;
};

}  // namespace q_cpu::dlpack
