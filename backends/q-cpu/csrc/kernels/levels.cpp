#include "levels.h"

namespace q_cpu {

namespace baseline {
extern const Kernels table;
}

#if defined(__x86_64__)

namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}

int find_levels(Level levels[kMaxLevels]) {
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
                          __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("bmi2");
  levels[0] = {&baseline::table, true};
  levels[1] = {&avx2::table, has_avx2};
  levels[2] = {&avx512::table, has_avx512};
  return 3;
}

#else

int find_levels(Level levels[kMaxLevels]) {
  levels[0] = {&baseline::table, true};
  return 1;
}

#endif

}  // namespace q_cpu
