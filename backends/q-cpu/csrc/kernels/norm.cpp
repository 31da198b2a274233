// Norms, rotary embedding and gated activation: each one pass over memory, a row at a time.
//
// A norm reads its row twice, the second time from cache.

#include "norm.h"

#include "pairs.h"
#include "vector_math.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

// Calls step(i, count) over 0…size in whole vectors, then once for what is left, if anything.
template <class Step>
inline void for_vectors(int64_t size, Step&& step) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) step(i, int64_t{kLanes});
  if (i < size) step(i, size - i);
}

template <class T>
inline Vector read_some(const T* from, int64_t count) {
  return count == kLanes ? read(from) : read_part(from, count);
}

template <class T>
inline void write_some(Vector v, T* to, int64_t count) {
  count == kLanes ? write(v, to) : write_part(v, to, count);
}

constexpr int kPairs = 2;  // of running sums of squares, so that additions don't wait for each other

struct SumsOfSquares {
  Vector sums[2 * kPairs] = {};

  void add(Two x, int pair) {
    sums[2 * pair] = multiply_add(x.a, x.a, sums[2 * pair]);
    sums[2 * pair + 1] = multiply_add(x.b, x.b, sums[2 * pair + 1]);
  }
  float total() const { return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])); }
};

// Sum of squares of a row that `next(k, count)` gives in pairs of vectors, zeros beyond its end.
template <class Next>
inline float sum_of_squares(int64_t K, Next&& next) {
  SumsOfSquares squares;
  int64_t k = 0;
  for (; k + kPairs * kPair <= K; k += kPairs * kPair) {
    for (int pair = 0; pair < kPairs; ++pair) squares.add(next(k + pair * kPair, kPair), pair);
  }
  for (int pair = 0; k < K; k += kPair, ++pair) squares.add(next(k, smaller(kPair, K - k)), pair);
  return squares.total();
}

// Into the second level of cache, which has room for what memory takes long to answer.
inline void fetch(const void* from) { __builtin_prefetch(from, 0, 2); }

// Normed by a known scale. Nothing here waits for memory, so it is the time to fetch the row after this one: `fetch_next(k)`.
template <bool kStream, class T, class FetchNext>
inline void norm_row(const T* x, const T* weight, float scale, int64_t K, T* out, FetchNext&& fetch_next) {
  for_pairs(K, [&](int64_t k, int64_t count) {
    fetch_next(k);
    const Two v = read_two(x + k, count), w = read_two(weight + k, count);
    write_two<kStream>({v.a * scale * w.a, v.b * scale * w.b}, out + k, count);
  });
}

inline float norm_scale(float squares, const RmsNorm& a) {
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(a.K) + a.eps);
}

template <class T, bool kStream>
void rms_norm_rows(const RmsNorm& a, int64_t first, int64_t last) {
  const T* weight = static_cast<const T*>(a.weight_K);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* out = static_cast<T*>(a.out) + row * a.K;
    const float squares = sum_of_squares(a.K, [&](int64_t k, int64_t count) { return read_two(x + k, count); });
    norm_row<kStream>(x, weight, norm_scale(squares, a), a.K, out, [next = x + a.x_stride](int64_t k) { fetch(next + k); });
  }
}

template <class T, bool kStream>
void add_rms_norm_rows(const RmsNorm& a, int64_t first, int64_t last) {
  const T* weight = static_cast<const T*>(a.weight_K);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
    T* total = static_cast<T*>(a.total) + row * a.K;
    T* out = static_cast<T*>(a.out) + row * a.K;
    const float squares = sum_of_squares(a.K, [&](int64_t k, int64_t count) {
      const Two v = read_two(x + k, count), r = read_two(residual + k, count);
      write_two<false>({v.a + r.a, v.b + r.b}, total + k, count);
      return read_two(total + k, count);  // as rounded
    });
    norm_row<kStream>(total, weight, norm_scale(squares, a), a.K, out,
                      [next = x + a.x_stride, next_residual = residual + a.residual_stride](int64_t k) {
                        fetch(next + k);
                        fetch(next_residual + k);
                      });
  }
}

// Cosines and sines of a token as a pair of neighbours needs them: (c, c) and (-s, s).
constexpr int64_t kAngles = 256;  // pairs at a time

inline void spread_angles(const float* cos, const float* sin, int64_t pairs, float* __restrict cosines, float* __restrict sines) {
  for (int64_t i = 0; i < pairs; ++i) {
    cosines[2 * i] = cosines[2 * i + 1] = cos[i];
    sines[2 * i] = -sin[i];
    sines[2 * i + 1] = sin[i];
  }
}

inline Vector swap_neighbours(Vector v) {
  Integers order = {};
  for (int i = 0; i < kLanes; ++i) order[i] = i ^ 1;
  return __builtin_shuffle(v, order);
}

// Components 2i and 2i + 1 turn together.
template <class T>
inline void rotate_neighbours(const T* in, const float* cosines, const float* sines, int64_t size, T* out) {
  for_vectors(size, [&](int64_t i, int64_t count) {
    const Vector v = read_some(in + i, count);
    const Vector turned = multiply_add(v, read_some(cosines + i, count), swap_neighbours(v) * read_some(sines + i, count));
    write_some(turned, out + i, count);
  });
}

// Components i and i + F turn together.
template <class T>
inline void rotate_halves(const T* in, const float* cos, const float* sin, int64_t F, T* out) {
  for_vectors(F, [&](int64_t i, int64_t count) {
    const Vector a = read_some(in + i, count), b = read_some(in + F + i, count);
    const Vector c = read_some(cos + i, count), s = read_some(sin + i, count);
    write_some(multiply_add(a, c, -(b * s)), out + i, count);
    write_some(multiply_add(b, c, a * s), out + F + i, count);
  });
}

template <class T>
inline void rotate_heads(const RotaryEmbedding& a, const Heads& heads, int64_t t) {
  const float* cos = a.cos_PF + a.positions_T[t] * a.F;
  const float* sin = a.sin_PF + a.positions_T[t] * a.F;
  const T* in = static_cast<const T*>(heads.in) + t * heads.token_stride;
  T* out = static_cast<T*>(heads.out) + t * heads.count * a.D;
  const size_t passing = static_cast<size_t>(a.D - 2 * a.F) * sizeof(T);
  for (int64_t h = 0; h < heads.count; ++h) {
    const T* head = in + h * heads.head_stride;
    T* turned = out + h * a.D;
    if (!a.interleaved) rotate_halves(head, cos, sin, a.F, turned);
    if (passing > 0) memcpy(turned + 2 * a.F, head + 2 * a.F, passing);
  }
  if (!a.interleaved) return;
  float cosines[2 * kAngles], sines[2 * kAngles];
  for (int64_t f = 0; f < a.F; f += kAngles) {
    const int64_t pairs = smaller(kAngles, a.F - f);
    spread_angles(cos + f, sin + f, pairs, cosines, sines);
    for (int64_t h = 0; h < heads.count; ++h) {
      rotate_neighbours(in + h * heads.head_stride + 2 * f, cosines, sines, 2 * pairs, out + h * a.D + 2 * f);
    }
  }
}

template <class T>
void rotate_tokens(const RotaryEmbedding& a, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; ++t) {
    rotate_heads<T>(a, a.q, t);
    rotate_heads<T>(a, a.k, t);
  }
}

constexpr int64_t kBytesAhead = 6144;  // far enough for memory to answer

template <class T, bool kStream>
void silu_and_mul_rows(const SiluAndMul& a, int64_t first, int64_t last) {
  constexpr int64_t kAhead = kBytesAhead / sizeof(T);
  for (int64_t row = first; row < last; ++row) {
    const T* gate = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* up = gate + a.N;
    T* out = static_cast<T*>(a.out) + row * a.N;
    for_pairs(a.N, [&](int64_t n, int64_t count) {
      // What is ahead of a row's end is the next row's beginning.
      const int64_t ahead = n + kAhead < a.N ? n + kAhead : n + kAhead - a.N + a.x_stride;
      fetch(gate + ahead);
      fetch(up + ahead);
      const Two g = read_two(gate + n, count), u = read_two(up + n, count);
      write_two<kStream>({silu_lanes(g.a) * u.a, silu_lanes(g.b) * u.b}, out + n, count);
    });
  }
}

void rms_norm(const RmsNorm& a, int64_t first, int64_t last) {
  with_element(a.dtype, [&](auto element) {
    using T = decltype(element);
    with_streaming(is_streamed(a.out, a.T, a.K * int64_t{sizeof(T)}), [&](auto streamed) {
      constexpr bool kStream = decltype(streamed)::value;
      a.residual == nullptr ? rms_norm_rows<T, kStream>(a, first, last) : add_rms_norm_rows<T, kStream>(a, first, last);
    });
  });
}

void rotary_embedding(const RotaryEmbedding& a, int64_t first, int64_t last) {
  with_element(a.dtype, [&](auto element) { rotate_tokens<decltype(element)>(a, first, last); });
}

void silu_and_mul(const SiluAndMul& a, int64_t first, int64_t last) {
  with_element(a.dtype, [&](auto element) {
    using T = decltype(element);
    with_streaming(is_streamed(a.out, a.T, a.N * int64_t{sizeof(T)}),
                   [&](auto streamed) { silu_and_mul_rows<T, decltype(streamed)::value>(a, first, last); });
  });
}

}  // namespace

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {rms_norm, rotary_embedding, silu_and_mul};

}  // namespace q_cpu::Q_CPU_LEVEL
