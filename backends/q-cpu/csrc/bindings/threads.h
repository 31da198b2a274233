// Loops over torch's own OpenMP threads.
//
// The module links no OpenMP runtime, because a second one would bring a second pool that torch.set_num_threads doesn't govern. It
// is told the address of GOMP_parallel in the runtime that torch has loaded (libgomp's entry point, which libiomp5 and libomp
// export too).

#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace q_cpu {

namespace py = pybind11;

// `gomp_parallel` may be 0: then loops run on the calling thread. `get_num_threads` is asked at every call that is worth sharing
// out.
void configure_threads(uintptr_t gomp_parallel, py::object get_num_threads);

// Threads a loop of `units` may use now. Needs the GIL.
int thread_count(int64_t units, int64_t grain);

// Calls run(context, first, last) on ranges that cover 0…units, each of `grain` units or more but for the last. Needs no GIL.
void parallel_ranges(int threads, int64_t units, int64_t grain, void (*run)(void*, int64_t, int64_t), void* context);

// Elements worth a thread's attention; below, waking one costs more than it saves.
constexpr int64_t kGrainElements = 32768;

// Runs body(first, last) over ranges of units that cost about `elements_per_unit` each, without the GIL.
template <class Body>
void parallel_for(int64_t units, int64_t elements_per_unit, Body&& body) {
  if (units <= 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_per_unit));
  const int threads = thread_count(units, grain);
  py::gil_scoped_release release;
  if (threads == 1) return body(int64_t{0}, units);
  parallel_ranges(
      threads, units, grain, [](void* context, int64_t first, int64_t last) { (*static_cast<Body*>(context))(first, last); },
      &body);
}

}  // namespace q_cpu
