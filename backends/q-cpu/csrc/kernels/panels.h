// The blocking of a matrix product, from a few tokens to prefill sizes.
//
// Activations are packed into a panel, kPanelK features wide, in the order in which tiles read them: straight on, which the
// processor prefetches and which no stride between tokens can spoil. The panel stays in L2 while a block of rows passes, a tile's
// rows at a time: read where they lie, or first decoded into a panel of their own in L1, once for all of the tokens.
//
// A sum is made a panel's width at a time, each part as in tile.h: its order depends on K alone.

#pragma once

#include "tile.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int64_t kPanelVectors = 2048 / static_cast<int64_t>(sizeof(Vector));  // of a token or a row in a panel
constexpr int64_t kTokenTiles = 32;                                             // of a panel: 256 KiB with AVX-512
constexpr int64_t kPanelTokens = kTokenTiles * kTileTokens;
constexpr int64_t kSumTiles = 2048;  // kept for a block of rows: 192 KiB

template <class P>
constexpr int64_t kPanelK = kPanelVectors * P::kStep;

// The vectors of a tile's tokens, or of its rows, alternate.
template <class P>
constexpr Strides kRowStrides = {P::kStep, kTileRows * P::kStep};

// x [T, K] times rows of a weight, plus a bias, to out [T, N].
struct Product {
  const void* x_TK;
  const void* bias_N;  // or null
  int64_t T, N, K;
  void* out_TN;
  Float dtype;  // of x and bias
  Float out_dtype;
};

typedef float TileSums[kTileSums];

inline int64_t tiles_of(int64_t count, int64_t tile) { return (count + tile - 1) / tile; }

inline void pack_vector(const float* x, float* out) {
  const Vector v = load_floats(x);
  memcpy(out, &v, sizeof v);
}
template <class X>
inline void pack_vector(const X* x, float* out) {
  const Vector v = load_floats(x);
  memcpy(out, &v, sizeof v);
}
inline void pack_vector(const Bf16* x, Bf16* out) { memcpy(out, x, sizeof(Vector)); }

#if defined(__AVX512F__)

// Of the words of two vectors the even and the odd ones.
inline void pack_even_odd(const Bf16* x, Bf16* even, Bf16* odd) {
  const __m512i low = _mm512_loadu_si512(x), high = _mm512_loadu_si512(x + 32);
  // Of 32 bits the lower half, or the upper, of each.
  const __m512i lanes = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const __m512i mask = _mm512_set1_epi32(0xffff);
  const __m512i evens = _mm512_packus_epi32(_mm512_and_si512(low, mask), _mm512_and_si512(high, mask));
  const __m512i odds = _mm512_packus_epi32(_mm512_srli_epi32(low, 16), _mm512_srli_epi32(high, 16));
  _mm512_storeu_si512(even, _mm512_permutexvar_epi64(lanes, evens));
  _mm512_storeu_si512(odd, _mm512_permutexvar_epi64(lanes, odds));
}

#endif

// Packs features k…k + width of up to a tile's tokens, filled up with zeros. With EvenOdd, of each 64 features the even ones come
// first, as decoding has it easiest.
template <class P, bool EvenOdd, class X>
inline void pack_tokens(const X* x, int64_t K, int64_t tokens, int64_t width, typename P::X* panel) {
  for (int64_t t = 0; t < tokens; ++t, x += K) {
    typename P::X* out = panel + t * P::kStep;
    int64_t k = 0;
    if constexpr (EvenOdd) {
      for (; k < width; k += 2 * P::kStep, out += 2 * tokens * P::kStep) pack_even_odd(x + k, out, out + tokens * P::kStep);
      continue;
    }
    for (; k + P::kStep <= width; k += P::kStep, out += tokens * P::kStep) {
      __builtin_prefetch(x + kTileTokens * K + k);  // the next tile's
      pack_vector(x + k, out);
    }
    if (k < width) {
      X padded[P::kStep] = {};
      memcpy(padded, x + k, static_cast<size_t>(width - k) * sizeof(X));
      pack_vector(padded, out);
    }
  }
}

// A tile's rows over a panel's width: where they begin and lie, and how far after them the next tile's do.
template <class P>
struct RowPanel {
  const typename P::W* begin;
  Strides strides;
  int64_t ahead;
};

// The sums over a panel's width of a tile's rows and the tokens of a tile, the `number`th of `of`. Rows in place are fetched from
// memory ahead of their turn, a share by each tile of tokens; where decoded ones lie is known when this is compiled.
template <class P, bool InPlace, int Tokens>
inline void multiply_some(const typename P::X* x, const RowPanel<P>& w, int64_t width, int64_t number, int64_t of, float* sums) {
  constexpr Strides x_strides{P::kStep, Tokens * P::kStep};
  if constexpr (InPlace) {
    const typename P::W* next = w.begin + w.ahead + width * number / of;
    multiply_tile<P, Tokens, kTileRows, true>(x, x_strides, w.begin, w.strides, width, sums, next, w.strides.step / of);
  } else {
    multiply_tile<P, Tokens, kTileRows, false>(x, x_strides, w.begin, kRowStrides<P>, width, sums, nullptr, 0);
  }
}

template <class P, bool InPlace>
inline void multiply_panel(int64_t tokens, const typename P::X* x, const RowPanel<P>& w, int64_t width, int64_t number, int64_t of,
                           float* sums) {
  switch (tokens) {
    case 1:
      return multiply_some<P, InPlace, 1>(x, w, width, number, of, sums);
    case 2:
      return multiply_some<P, InPlace, 2>(x, w, width, number, of, sums);
    case 3:
      return multiply_some<P, InPlace, 3>(x, w, width, number, of, sums);
    default:
      return multiply_some<P, InPlace, kTileTokens>(x, w, width, number, of, sums);
  }
}

// Adds the biases and writes the sums of `tokens` tokens from `token` on and of `rows` rows, up to a tile, from `row` on.
inline void write_sums(const Product& a, int64_t row, int64_t rows, int64_t token, int64_t tokens, const TileSums* sums) {
  float bias_buffer[kTileRows];
  const float* bias = a.bias_N ? load(a.bias_N, a.dtype, row, rows, bias_buffer) : nullptr;
  for (int64_t t = 0; t < tokens; ++t) {
    const float* from = sums[t / kTileTokens] + t % kTileTokens * kTileRows;
    float values[kTileRows];
    for (int64_t r = 0; r < rows; ++r) values[r] = bias ? from[r] + bias[r] : from[r];
    store(values, rows, a.out_TN, a.out_dtype, (token + t) * a.N + row);
  }
}

// `rows_at(row, rows, k, width, panel)` gives features k…k + width of `rows` rows from `row` on, of at most a tile: where they lie,
// if Rows::kInPlace, or decoded into the panel in the order of kRowStrides. What else is in the tile's rows or in a last vector is
// not used.
template <class P, class X, class Rows>
inline void multiply_panels(const Product& a, int64_t first, int64_t last, const Rows& rows_at) {
  alignas(64) typename P::X x_panel[kTokenTiles][kTileTokens * kPanelK<P>];
  alignas(64) typename P::W w_panel[kTileRows * kPanelK<P>];
  alignas(64) TileSums sums[kSumTiles];
  const X* x = static_cast<const X*>(a.x_TK);
  for (int64_t token = 0; token < a.T; token += kPanelTokens) {
    const int64_t tokens = smaller(kPanelTokens, a.T - token);
    const int64_t token_tiles = tiles_of(tokens, kTileTokens);
    const int64_t block_rows = kSumTiles / token_tiles * kTileRows;
    for (int64_t row = first; row < last; row += block_rows) {
      const int64_t rows = smaller(block_rows, last - row);
      memset(sums, 0, static_cast<size_t>(tiles_of(rows, kTileRows) * token_tiles) * sizeof(TileSums));
      for (int64_t k = 0; k < a.K; k += kPanelK<P>) {
        const int64_t width = smaller(kPanelK<P>, a.K - k);
        for (int64_t t = 0; t < tokens; t += kTileTokens) {
          pack_tokens<P, Rows::kEvenOdd>(x + (token + t) * a.K + k, a.K, smaller(kTileTokens, tokens - t), width,
                                         x_panel[t / kTileTokens]);
        }
        TileSums* tile = sums;
        for (int64_t r = 0; r < rows; r += kTileRows) {
          const RowPanel<P> w = rows_at(row + r, smaller(kTileRows, rows - r), k, width, w_panel);
          for (int64_t t = 0; t < token_tiles; ++t, ++tile) {
            multiply_panel<P, Rows::kInPlace>(smaller(kTileTokens, tokens - t * kTileTokens), x_panel[t], w, width, t, token_tiles,
                                              *tile);
          }
        }
      }
      const TileSums* tile = sums;
      for (int64_t r = 0; r < rows; r += kTileRows, tile += token_tiles) {
        write_sums(a, row + r, smaller(kTileRows, rows - r), token, tokens, tile);
      }
    }
  }
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
