// Products of a few tokens with dense weights: rows are read one after the other, at the speed of memory.
//
// Two rows at once would make memory switch between their pages at every line, which costs a third of its speed. So a tile is one
// row and all tokens. Its activations must stay in L1: the more tokens, the narrower the part of the features that is done for a
// block of rows, before the next part is. Sums are made as in panels.h, bit for bit.

#pragma once

#include "ahead.h"
#include "panels.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kStreamedTokens = 8;
#else
constexpr int kStreamedTokens = 2;
#endif
constexpr int64_t kStreamedRows = 128;       // a block of rows
constexpr int64_t kLinesAheadBytes = 8192;   // of weights, to fetch ahead
constexpr int64_t kWholeRowPanels = 4;       // of a part that makes whole rows, if K is small enough, of one token or two

template <class P, class X, int Tokens>
inline void stream_dense(const Product& a, const typename P::W* w_NK, int64_t first, int64_t last) {
  constexpr int64_t kPart = (Tokens <= 2 ? kWholeRowPanels : 1) * kPanelK<P>;
  constexpr Strides kTokenStrides{P::kStep, Tokens * P::kStep};
  alignas(64) typename P::X tokens[kPart * Tokens];
  float sums[kStreamedRows][whole_sums(Tokens)];
  const X* x = static_cast<const X*>(a.x_TK);
  for (int64_t row = first; row < last; row += kStreamedRows) {
    const int64_t rows = smaller(kStreamedRows, last - row);
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < a.K; k += kPart) {
      const int64_t width = smaller(kPart, a.K - k);
      const int64_t part_bytes = width * static_cast<int64_t>(sizeof(typename P::W));
      const int64_t ahead = tiles_of(kLinesAheadBytes, part_bytes) * a.K;
      pack_tokens<P>(x + k, a.K, Tokens, width, tokens);
      for (int64_t r = 0; r < rows; ++r) {
        const typename P::W* w = w_NK + (row + r) * a.K + k;
        look_up_pages(w, part_bytes);
        for (int64_t i = 0; i < width; i += kPanelK<P>) {
          multiply_tile<P, Tokens, 1, true>(tokens + i * Tokens, kTokenStrides, w + i, {a.K, P::kStep}, smaller(kPanelK<P>, width - i),
                                            sums[r], w + i + ahead, P::kStep);
        }
      }
    }
    ...
  }
}
