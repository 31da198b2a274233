// Products with dense weights: how many tokens decides how the weight is read.
//
// Few: its rows one after the other, at the speed of memory. Several at once make memory switch between their pages at every line,
// which costs a third of its speed; two pay only where loads of many tokens are what takes the time. A tile has all tokens; their
// activations must stay in L1, so with more of them a narrower part of the features is multiplied with a block of rows before the
// next part is.
//
// Many, and all without AVX-512, where computing takes longer than reading: in the tiles of panels.h. Both make a sum in the same
// order, so a token's bits don't depend on which it is.

#pragma once

#include "ahead.h"
#include "panels.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

#if defined(__AVX512F__)

constexpr int kStreamedTokens = 8;
constexpr int64_t kStreamedRows = 64;        // a block
constexpr int64_t kStreamedBytes = 1 << 18;  // of activations
constexpr int64_t kLinesAheadBytes = 8192;

// What a tile of so many tokens has of a weight: rows, and panels' widths of features at a time. Four of those are whole rows of
// many models.
template <int Tokens>
struct Streamed {
  static constexpr int kRows = Tokens > 4 ? 2 : 1;
  static constexpr int64_t kPanels = Tokens <= 2 ? 4 : 1;
};

// Adds the biases to the sums of a block of rows and writes them, token by token.
template <int Tokens, int Rows>
inline void write_streamed(const Product& a, int64_t row, int64_t rows, const float (*sums)[whole_sums(Tokens * Rows)]) {
  float bias_buffer[kStreamedRows], values[kStreamedRows];
  const float* bias = a.bias_N ? load(a.bias_N, a.dtype, row, rows, bias_buffer) : nullptr;
  for (int64_t t = 0; t < Tokens; ++t) {
    for (int64_t r = 0; r < rows; ++r) values[r] = sums[r / Rows][t * Rows + r % Rows] + (bias ? bias[r] : 0.0f);
    store(values, rows, a.out_TN, a.out_dtype, t * a.N + row);
  }
}

template <class P, class X, int Tokens>
inline void stream_row_by_row(const Product& a, const typename P::W* w_NK, int64_t first, int64_t last) {
  constexpr int kRows = Streamed<Tokens>::kRows;
  constexpr int64_t kPart = Streamed<Tokens>::kPanels * kPanelK<P>;
  constexpr Strides kTokenStrides{P::kStep, Tokens * P::kStep};
  alignas(64) typename P::X tokens[kStreamedBytes / sizeof(typename P::X)];
  float sums[kStreamedRows / kRows][whole_sums(Tokens * kRows)];
  pack_tokens<P, false>(static_cast<const X*>(a.x_TK), a.K, Tokens, a.K, tokens);
  for (int64_t row = first; row < last; row += kStreamedRows) {
    const int64_t rows = smaller(kStreamedRows, last - row);
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < a.K; k += kPart) {
      const int64_t width = smaller(kPart, a.K - k);
      const int64_t bytes = width * static_cast<int64_t>(sizeof(typename P::W));
      const int64_t ahead = tiles_of(kLinesAheadBytes, bytes) * a.K;
      for (int64_t r = 0; r < rows; r += kRows) {
        const typename P::W* w = w_NK + (row + r) * a.K + k;
        const Strides strides{r + kRows <= rows ? a.K : 0, P::kStep};  // an odd last row is taken twice
        for (int i = 0; i < kRows; ++i) look_up_pages(w + 3 * ahead + i * a.K, bytes);
        for (int64_t i = 0; i < width; i += kPanelK<P>) {
          multiply_tile<P, Tokens, kRows, true>(tokens + (k + i) * Tokens, kTokenStrides, w + i, strides,
                                                smaller(kPanelK<P>, width - i), sums[r / kRows], w + i + ahead, P::kStep);
        }
      }
    }
    write_streamed<Tokens, kRows>(a, row, rows, sums);
  }
}

// Whether `stream_dense` takes a product: its activations are packed as a whole, and a last vector of them is filled up.
template <class P>
inline bool can_stream_dense(const Product& a) {
  const int64_t number = sizeof(typename P::X);
  return a.T <= kStreamedTokens && (a.K + P::kStep) * a.T * number <= kStreamedBytes;
}

template <class P, class X>
inline void stream_dense(const Product& a, const typename P::W* w_NK, int64_t first, int64_t last) {
  switch (a.T) {
    case 1:
      return stream_row_by_row<P, X, 1>(a, w_NK, first, last);
    case 2:
      return stream_row_by_row<P, X, 2>(a, w_NK, first, last);
    case 3:
      return stream_row_by_row<P, X, 3>(a, w_NK, first, last);
    case 4:
      return stream_row_by_row<P, X, 4>(a, w_NK, first, last);
    case 5:
      return stream_row_by_row<P, X, 5>(a, w_NK, first, last);
    case 6:
      return stream_row_by_row<P, X, 6>(a, w_NK, first, last);
    case 7:
      return stream_row_by_row<P, X, 7>(a, w_NK, first, last);
    case 8:
      return stream_row_by_row<P, X, 8>(a, w_NK, first, last);
  }
}

#endif

// The rows of a dense weight for multiply_panels, where they lie; but for a last tile of fewer rows, which is copied.
template <class P>
struct DenseRows {
  static constexpr bool kInPlace = true;
  static constexpr bool kEvenOdd = false;

  const typename P::W* w_NK;
  int64_t K;

  RowPanel<P> operator()(int64_t row, int64_t rows, int64_t k, int64_t width, typename P::W* panel) const {
    const typename P::W* begin = w_NK + row * K + k;
    if (rows == kTileRows) return {begin, {K, P::kStep}, kTileRows * K};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < width; i += P::kStep) {
        const int64_t count = smaller(P::kStep, width - i);
        typename P::W* to = panel + r * kRowStrides<P>.line + i / P::kStep * kRowStrides<P>.step;
        memcpy(to, begin + r * K + i, static_cast<size_t>(count) * sizeof(typename P::W));
      }
    }
    return {panel, kRowStrides<P>, 0};
  }
};

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
