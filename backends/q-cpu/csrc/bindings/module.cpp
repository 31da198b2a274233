#include "module.h"

#include <pybind11/stl.h>

#include <optional>

#include "state.h"
#include "threads.h"

PYBIND11_MODULE(_native, m) {
  namespace py = pybind11;
  using namespace q_cpu;

  m.doc() = "Kernels of q_cpu. Private: q_cpu.runtime sets it up, the families' modules call it.";
  m.def("isa", [] { return kernels().name; }, "Name of the ISA level in use.");
  m.def("isa_display", [] { return kernels().display; }, "Name of the ISA level in use, as people write it.");
  m.def("available_isas", &available_isas, "Names of the ISA levels this machine can run, from the plainest.");
  m.def("set_isa", &set_isa, py::arg("name"), "Use another ISA level, for the whole process.");
  m.def(
      "configure_threads",
      [](std::optional<uintptr_t> gomp_parallel, py::object get_num_threads) {
        configure_threads(gomp_parallel.value_or(0), std::move(get_num_threads));
      },
      py::arg("gomp_parallel"), py::arg("get_num_threads"),
      "Share loops out over the runtime that has this GOMP_parallel, or over none.");
  m.def("use_exchange_api", &use_exchange_api, py::arg("wanted"),
        "Choose how tensors are read (for tests); whether the API is used.");
  m.def("register_4bit", &register_4bit, py::arg("quant_type"), py::arg("values"), py::arg("ordered"), py::arg("scale"),
        "Make a 4-bit code book known.");
  bind_quantize(m);
  bind_gemm(m);
  bind_optim(m);
  bind_int8(m);
  bind_attention(m);
  bind_norm(m);
  bind_moe(m);
}
