// Norms, rotary embedding and gated activation: each one pass over memory, a row at a time.
//
// A norm reads its row twice, the second time from L1.

#include "norm.h"

#include "vector_math.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int kSums = 4;  // running sums of squares, so that additions don't wait for each other

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

inline float sum_of(const Vector (&sums)[kSums]) { return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])); }

// Sum of squares of a row that `next(i, count)` gives in vectors, zeros beyond its end.
template <class Next>
inline float sum_of_squares(int64_t K, Next&& next) {
  Vector sums[kSums] = {};
  int64_t k = 0;
  for (; k + kSums * kLanes <= K; k += kSums * kLanes) {
    for (int s = 0; s < kSums; ++s) {
      const Vector x = next(k + s * kLanes, int64_t{kLanes});
      sums[s] = multiply_add(x, x, sums[s]);
    }
  }
  for (int s = 0; k < K; k += kLanes, ++s) {
    const Vector x = next(k, smaller(kLanes, K - k));
    sums[s] = multiply_add(x, x, sums[s]);
  }
  return sum_of(sums);
}

template <class T>
inline void norm_row(const T* x, const T* weight, float scale, int64_t K, T* out) {
  for_vectors(K, [&](int64_t k, int64_t count) {
    write_some(read_some(x + k, count) * scale * read_some(weight + k, count), out + k, count);
  });
}

template <class T>
void rms_norm_rows(const RmsNorm& a, int64_t first, int64_t last) {
  const T* weight = static_cast<const T*>(a.weight_K);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    float squares;
    if (a.residual == nullptr) {
      squares = sum_of_squares(a.K, [&](int64_t k, int64_t count) { return read_some(x + k, count); });
    } else {
      const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
      T* total = static_cast<T*>(a.total) + row * a.K;
      squares = sum_of_squares(a.K, [&](int64_t k, int64_t count) {
        write_some(read_some(x + k, count) + read_some(residual + k, count), total + k, count);
        return read_some(total + k, count);  // as rounded
      });
      x = total;
    }
    const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(a.K) + a.eps);
    norm_row(x, weight, scale, a.K, static_cast<T*>(a.out) + row * a.K);
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

template <class T>
void silu_and_mul_rows(const SiluAndMul& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* gate = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* up = gate + a.N;
    T* out = static_cast<T*>(a.out) + row * a.N;
    for_vectors(a.N, [&](int64_t n, int64_t count) {
      const Vector g = read_some(gate + n, count);
      write_some(g * sigmoid_lanes(g) * read_some(up + n, count), out + n, count);
    });
  }
}

void rms_norm(const RmsNorm& a, int64_t first, int64_t last) {
  with_element(a.dtype, [&](auto element) { rms_norm_rows<decltype(element)>(a, first, last); });
}

void rotary_embedding(const RotaryEmbedding& a, int64_t first, int64_t last) {
  with_element(a.dtype, [&](auto element) { rotate_tokens<decltype(element)>(a, first, last); });
}

void silu_and_mul(const SiluAndMul& a, int64_t first, int64_t last) {
  with_element(a.dtype, [&](auto element) { silu_and_mul_rows<decltype(element)>(a, first, last); });
}

}  // namespace

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {rms_norm, rotary_embedding, silu_and_mul};

}  // namespace q_cpu::Q_CPU_LEVEL
