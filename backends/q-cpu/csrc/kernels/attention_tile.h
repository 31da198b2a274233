// The matrix products of attention on tiles of keys: queries · keys are scores, weights · values are added to outputs.
//
// Operands are 32-bit lanes. In a *wide* tile a lane is one float32; in a *pair* tile it is two bfloat16 that follow each other
// along the depth, which one instruction multiplies and adds. The depth of the first product is the head dimension, of the second
// the keys.
//
// How a row's products are summed doesn't depend on the rows beside it. Along a head dimension that is in four sums, of the lanes
// k = 0, 1, 2 and 3 modulo 4, and then of these in their order; along the keys it is in the keys' order.

#pragma once

#include "transpose.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int64_t kKeyTile = 32;  // keys taken together
constexpr int kTileVectors = kKeyTile / kLanes;
constexpr int64_t kPhases = 4;  // sums of a score

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Where the keys and values of a tile lie; for those that are not to be read, a row of zeros.
struct TileRows {
  const void* key[kKeyTile];
  const void* value[kKeyTile];
};

// A vector of lanes from the first `count` elements, zeros after them; reads no more than they are.
template <class Tile, class T>
inline Vector read_some_lanes(const T* from, int64_t count) {
  constexpr int64_t kWhole = kLanes * Tile::kDepth;
  if (count >= kWhole) return Tile::read_lanes(from);
  T padded[kWhole] = {};
  if (count > 0) memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return Tile::read_lanes(padded);
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

struct WideTile {
  static constexpr int64_t kDepth = 1;  // elements of a lane
  template <class T>
  static constexpr bool kReadsInPlace = kSame<T, float>;  // elements are lanes as they are

  static Vector multiply(Vector a, Vector b, Vector sum) { return multiply_add(a, b, sum); }
  static Vector multiply(float a, Vector b, Vector sum) { return multiply_add(broadcast(a), b, sum); }

  template <class T>
  static Vector read_lanes(const T* from) {
    return read(from);
  }

  // Columns d…d + kLanes of a value, as kDepth vectors.
  template <class T>
  static void read_columns(const void* const* rows, int64_t d, int64_t D, Vector* columns) {
    columns[0] = read_some_lanes<WideTile>(static_cast<const T*>(rows[0]) + d, D - d);
  }

  // Weights of all keys, kTileVectors in order, as lanes.
  static void store_weights(const Vector* weights, float* lanes) {
    for (int i = 0; i < kTileVectors; ++i) write(weights[i], lanes + i * kLanes);
  }
};

#if defined(__AVX512BF16__)

struct PairTile {
  static constexpr int64_t kDepth = 2;
  template <class T>
  static constexpr bool kReadsInPlace = kSame<T, Bf16>;

  static Vector multiply(Vector a, Vector b, Vector sum) {
    return same_bits<Vector>(_mm512_dpbf16_ps(same_bits<__m512>(sum), same_bits<__m512bh>(a), same_bits<__m512bh>(b)));
  }
  static Vector multiply(float a, Vector b, Vector sum) { return multiply(same_bits<Vector>(_mm512_set1_ps(a)), b, sum); }

  // 32 elements as bfloat16. Codes are exact in it.
  static Vector read_lanes(const Bf16* from) { return load_raw<Vector>(from); }

  template <class Code>
  static Vector read_lanes(const Code* from) {
    const Vector low = read(from), high = read(from + kLanes);
    return same_bits<Vector>(_mm512_cvtne2ps_pbh(same_bits<__m512>(high), same_bits<__m512>(low)));
  }

  // Columns d…d + 2 · kLanes of two keys' values, pairs of the two.
  template <class T>
  static void read_columns(const void* const* rows, int64_t d, int64_t D, Vector* columns) {
    const __m512i a = same_bits<__m512i>(read_some_lanes<PairTile>(static_cast<const T*>(rows[0]) + d, D - d));
    const __m512i b = same_bits<__m512i>(read_some_lanes<PairTile>(static_cast<const T*>(rows[1]) + d, D - d));
    columns[0] = same_bits<Vector>(_mm512_permutex2var_epi16(a, interleaved(0), b));
    columns[1] = same_bits<Vector>(_mm512_permutex2var_epi16(a, interleaved(16), b));
  }

  static void store_weights(const Vector* weights, float* lanes) {
    for (int64_t i = 0; i < kTileVectors; i += 2) {
      const __m512bh pairs = _mm512_cvtne2ps_pbh(same_bits<__m512>(weights[i + 1]), same_bits<__m512>(weights[i]));
      memcpy(lanes + i * kLanes / 2, &pairs, sizeof pairs);
    }
  }

 private:
  // Words `first`… of two operands, in turns.
  static __m512i interleaved(int first) {
    const __m512i ascending = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_or_si512(_mm512_add_epi32(ascending, _mm512_set1_epi32(first)),
                           _mm512_slli_epi32(_mm512_add_epi32(ascending, _mm512_set1_epi32(first + 32)), 16));
  }
};

#endif

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
