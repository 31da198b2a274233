#include "threads.h"

#include <atomic>

namespace q_cpu {

namespace {

using GompParallel = void (*)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

constexpr int kRangesPerThread = 4;  // so that a thread that lost its core to another process holds up little

GompParallel gomp_parallel = nullptr;
PyObject* get_num_threads = nullptr;  // owned for the life of the process: no destructor runs after the interpreter's end

struct Loop {
  std::atomic<int64_t> next{0};
  int64_t units;
  int64_t range;
  void (*run)(void*, int64_t, int64_t);
  void* context;
};

// Each thread of the team takes ranges until none is left, so that the work is done whatever the size of the team that came.
void take_ranges(void* data) {
  Loop& loop = *static_cast<Loop*>(data);
  for (;;) {
    const int64_t first = loop.next.fetch_add(loop.range, std::memory_order_relaxed);
    if (first >= loop.units) return;
    loop.run(loop.context, first, std::min(first + loop.range, loop.units));
  }
}

}  // namespace

void configure_threads(uintptr_t address, py::object callable) {
  gomp_parallel = reinterpret_cast<GompParallel>(address);
  Py_XDECREF(get_num_threads);
  get_num_threads = callable.release().ptr();
}

int thread_count(int64_t units, int64_t grain) {
  if (gomp_parallel == nullptr || units <= grain) return 1;
  const int64_t wanted = py::reinterpret_borrow<py::object>(get_num_threads)().cast<int64_t>();
  return static_cast<int>(std::clamp<int64_t>(std::min(wanted, (units + grain - 1) / grain), 1, 1 << 16));
}

void parallel_ranges(int threads, int64_t units, int64_t grain, void (*run)(void*, int64_t, int64_t), void* context) {
  const int64_t shares = static_cast<int64_t>(threads) * kRangesPerThread;
  Loop loop;
  loop.units = units;
  loop.range = std::max(grain, (units + shares - 1) / shares);
  loop.run = run;
  loop.context = context;
  gomp_parallel(take_ranges, &loop, static_cast<unsigned>(threads), 0);
}

}  // namespace q_cpu
