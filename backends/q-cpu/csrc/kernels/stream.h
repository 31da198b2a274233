// Stores past the caches.
//
// A plain store to memory that is not cached reads it first; one past the caches doesn't, which saves a third of the traffic, but a
// reader that comes next finds nothing in the cache. So it is for outputs that no cache would hold anyway.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "convert.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int64_t kStreamedBytes = int64_t{16} << 20;

#if defined(__AVX2__)
constexpr bool kCanStream = true;
#else
constexpr bool kCanStream = false;
#endif

inline bool is_streamed(const void* out, int64_t bytes) {
  return kCanStream && bytes >= kStreamedBytes && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

// The same of rows that lie one after the other and are written from their beginnings on.
inline bool is_streamed(const void* out, int64_t rows, int64_t row_bytes) {
  return row_bytes % 64 == 0 && is_streamed(out, rows * row_bytes);
}

// Writes a register; where `kStream`, `out` is aligned to its size.
template <bool kStream, class Register>
inline void put(void* out, Register values) {
#if defined(__AVX512F__)
  if (kStream) {
    static_assert(sizeof values == 64);
    return _mm512_stream_si512(static_cast<__m512i*>(out), reinterpret_cast<__m512i>(values));
  }
#elif defined(__AVX2__)
  if (kStream) {
    static_assert(sizeof values == 32);
    return _mm256_stream_si256(static_cast<__m256i*>(out), reinterpret_cast<__m256i>(values));
  }
#endif
  memcpy(out, &values, sizeof values);
}

// After the last of the stores past the caches: whoever is told that the work is done sees them.
inline void end_stream() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Calls work(Flag) with a flag that is known to the compiler, and ends the stream.
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

template <class Work>
inline void with_streaming(bool streamed, Work&& work) {
  if (!streamed) return work(Flag<false>{});
  work(Flag<true>{});
  end_stream();
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
