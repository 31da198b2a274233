// Matrix products with 4-bit weights.
//
// An output element is summed over k in one order, whatever else is computed beside it: it depends neither on the number of tokens
// in the call nor on how rows are shared out between threads. So a sequence gets the same bits alone and in a batch.

#include "gemm.h"

#include "four_bit.h"
#include "vector.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int kTile = 4;              // tokens and rows of a register tile
constexpr int64_t kPanelRows = 8;     // weight rows decoded together
constexpr int64_t kPanelTokens = 64;  // tokens that a decoded panel serves
constexpr int64_t kPanelK = 512;      // in features decoded at a time: the panel stays in L1

// Adds x · w over `width` features to sums of `Tokens` tokens and kTile rows. Rows of w are kPanelK floats apart and zero beyond
// the width.
template <int Tokens>
inline void accumulate_tile(const float* x, int64_t x_stride, const float (*w)[kPanelK], int64_t width,
                            Vector (*sums)[kPanelRows]) {
  Vector tile[Tokens][kTile];
  for (int t = 0; t < Tokens; ++t)
    for (int r = 0; r < kTile; ++r) tile[t][r] = sums[t][r];

  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    Vector rows[kTile];
    for (int r = 0; r < kTile; ++r) rows[r] = load_vector(w[r] + k);
    for (int t = 0; t < Tokens; ++t) {
      const Vector token = load_vector(x + t * x_stride + k);
      for (int r = 0; r < kTile; ++r) tile[t][r] = multiply_add(token, rows[r], tile[t][r]);
    }
  }
  if (k < width) {
    for (int t = 0; t < Tokens; ++t) {
      const Vector token = load_part(x + t * x_stride + k, width - k);
      for (int r = 0; r < kTile; ++r) tile[t][r] = multiply_add(token, load_vector(w[r] + k), tile[t][r]);
    }
  }

  for (int t = 0; t < Tokens; ++t)
    for (int r = 0; r < kTile; ++r) sums[t][r] = tile[t][r];
}

inline void accumulate_tokens(int64_t tokens, const float* x, int64_t x_stride, const float (*w)[kPanelK], int64_t width,
                              Vector (*sums)[kPanelRows]) {
  switch (tokens) {
    case 1:
      return accumulate_tile<1>(x, x_stride, w, width, sums);
    case 2:
      return accumulate_tile<2>(x, x_stride, w, width, sums);
    case 3:
      return accumulate_tile<3>(x, x_stride, w, width, sums);
    default:
      return accumulate_tile<kTile>(x, x_stride, w, width, sums);
  }
}

// Decodes features k…k + width of `rows` rows, and fills the panel up to whole tiles and whole vectors with zeros.
inline void decode_panel(const Gemm4bit& a, int64_t row, int64_t rows, int64_t k, int64_t width, float (*panel)[kPanelK]) {
  const int64_t padded = smaller(kPanelK, width + kLanes - 1);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = width; i < padded; ++i) panel[r][i] = 0.0f;
    decode_4bit(a.packed, a.absmax, *a.book, a.blocksize, (row + r) * a.K + k, width, panel[r]);
  }
  for (int64_t r = rows; r % kTile != 0; ++r) memset(panel[r], 0, sizeof panel[r]);
}

inline void write_panel(const Gemm4bit& a, int64_t row, int64_t rows, int64_t token, int64_t tokens, Vector (*sums)[kPanelRows]) {
  for (int64_t t = 0; t < tokens; ++t) {
    float out[kPanelRows];
    for (int64_t r = 0; r < rows; ++r) {
      const float sum = sum_lanes(sums[t][r]);
      out[r] = a.bias_N ? sum + a.bias_N[row + r] : sum;
    }
    store(out, rows, a.out_TN, a.dtype, (token + t) * a.N + row);
  }
}

void gemm_4bit(const Gemm4bit& a, int64_t first, int64_t last) {
  alignas(64) float panel[kPanelRows][kPanelK];
  alignas(64) Vector sums[kPanelTokens][kPanelRows];
  for (int64_t row = first; row < last; row += kPanelRows) {
    const int64_t rows = smaller(kPanelRows, last - row);
    for (int64_t token = 0; token < a.T; token += kPanelTokens) {
      const int64_t tokens = smaller(kPanelTokens, a.T - token);
      memset(sums, 0, static_cast<size_t>(tokens) * sizeof sums[0]);
      for (int64_t k = 0; k < a.K; k += kPanelK) {
        const int64_t width = smaller(kPanelK, a.K - k);
        decode_panel(a, row, rows, k, width, panel);
        for (int64_t t = 0; t < tokens; t += kTile) {
          const float* x = a.x_TK + (token + t) * a.K + k;
          for (int64_t r = 0; r < rows; r += kTile) {
            accumulate_tokens(smaller(kTile, tokens - t), x, a.K, panel + r, width,
                              reinterpret_cast<Vector(*)[kPanelRows]>(&sums[t][r]));
          }
        }
      }
      write_panel(a, row, rows, token, tokens, sums);
    }
  }
}

}  // namespace

extern const GemmKernels gemm_kernels;
const GemmKernels gemm_kernels = {gemm_4bit};

}  // namespace q_cpu::Q_CPU_LEVEL
