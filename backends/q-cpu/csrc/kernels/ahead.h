// Fetching ahead in weights that stream from memory, each byte used once.
//
// Within a page, asking for lines a few KB ahead keeps memory busy. Where a page lies must be looked up first, though, and a
// request that waits for it holds up those behind it: with pages of 4 KB scattered over memory, as in any process that has run for
// a while, this costs a third of the bandwidth. One line of each page, asked for long before the others, hides it.

#pragma once

#include <stdint.h>

#include "level.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int64_t kPageBytes = 4096;
constexpr int64_t kPagesAheadBytes = 8 * kPageBytes;  // beyond the lines that are fetched ahead

// Has the pages of `bytes` bytes from `from` on looked up. Nothing is read: any address will do.
inline void look_up_pages(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kPageBytes) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
