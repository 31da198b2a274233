// The blocking of a matrix product with weights that must be decoded, from a few tokens to prefill sizes.
//
// Activations and weights are packed into panels, kPanelK features wide, in the order in which tiles read them: straight on, which
// the processor prefetches and which no stride between rows can spoil. The tokens' panel stays in L2 while a block of rows passes,
// a tile's rows at a time, each decoded into L1 for all of the panel's tokens.
//
// A sum is made a panel's width at a time, each part as in tile.h: its order depends on K alone.

#pragma once

#include "tile.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int64_t kPanelVectors = 2048 / static_cast<int64_t>(sizeof(Vector));  // of a token or a row in a panel
constexpr int64_t kTokenTiles = 32;                                            // of a panel: 256 KiB with AVX-512
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
  Float dtype;  // of x, bias and out
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

// Packs features k…k + width of up to a tile's tokens, filled up with zeros.
template <class P, class X>
inline void pack_tokens(const X* x, int64_t K, int64_t tokens, int64_t width, typename P::Number* panel) {
  for (int64_t t = 0; t < tokens; ++t, x += K) {
    typename P::Number* out = panel + t * P::kStep;
    int64_t k = 0;
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

// A tile's sums over a panel's width.
template <class P>
inline void multiply_panel(int64_t tokens, const typename P::Number* x, const typename P::Number* w, int64_t width, float* sums) {
  const Strides x_strides{P::kStep, tokens * P::kStep};
  switch (tokens) {
    case 1:
      return multiply_tile<P, 1, kTileRows>(x, x_strides, w, kRowStrides<P>, width, sums);
    case 2:
      return multiply_tile<P, 2, kTileRows>(x, x_strides, w, kRowStrides<P>, width, sums);
    case 3:
      return multiply_tile<P, 3, kTileRows>(x, x_strides, w, kRowStrides<P>, width, sums);
    default:
      return multiply_tile<P, kTileTokens, kTileRows>(x, {P::kStep, kTileTokens * P::kStep}, w, kRowStrides<P>, width, sums);
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
    store(values, rows, a.out_TN, a.dtype, (token + t) * a.N + row);
  }
}

// `fill(row, rows, k, width, panel)` decodes features k…k + width of `rows` rows from `row` on, of at most a tile, in the order of
// kRowStrides; what else is in the tile's rows or in a last vector is not used.
template <class P, class X, class Fill>
inline void multiply_panels(const Product& a, int64_t first, int64_t last, Fill&& fill) {
  alignas(64) typename P::Number x_panel[kTokenTiles][kTileTokens * kPanelK<P>];
  alignas(64) typename P::Number w_panel[kTileRows * kPanelK<P>];
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
          pack_tokens<P>(x + (token + t) * a.K + k, a.K, smaller(kTileTokens, tokens - t), width, x_panel[t / kTileTokens]);
        }
        TileSums* tile = sums;
        for (int64_t r = 0; r < rows; r += kTileRows) {
          fill(row + r, smaller(kTileRows, rows - r), k, width, w_panel);
          for (int64_t t = 0; t < tokens; t += kTileTokens, ++tile) {
            multiply_panel<P>(smaller(kTileTokens, tokens - t), x_panel[t / kTileTokens], w_panel, width, *tile);
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
