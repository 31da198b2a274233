// Register tiles on 32-bit words, for products of many tokens.
//
// A word is what one lane of a dot instruction takes of a row: four int8, two int16 or bfloat16, one float32. A panel holds words
// of kPackedRows weight rows, transposed so that a vector has one word of each of kLanes rows; a token's word is broadcast against
// it. So a lane's sum belongs to one row: nothing is summed across lanes, and scales and biases of rows come as vectors.

#pragma once

#include "vector.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int64_t kPackedRows = 64;
constexpr int64_t kPackedWords = 128;  // of a row at a time: the panel's 32 KB stay in the first caches
constexpr int64_t kBlockTokens = 256;  // that share a panel; their activations stay in the second cache
static_assert(kPackedRows % kLanes == 0);

// Sums of a tile are kept in registers, beside the panel's vectors and a token's word.
#if defined(__AVX512F__)
constexpr int kTileTokens = 6;
constexpr int kTileVectors = 4;
#else
constexpr int kTileTokens = 4;
constexpr int kTileVectors = 2;
#endif
constexpr int64_t kTileRows = kTileVectors * kLanes;

constexpr int64_t kLineBytes = 64;

typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));

inline Words load_words(const uint32_t* from) {
  Words v;
  memcpy(&v, from, sizeof v);
  return v;
}

inline void store_words(Words v, uint32_t* to) { memcpy(to, &v, sizeof v); }

// Sum of the lanes, halves onto halves: the order of sum_lanes, without a detour through memory.
template <class Lanes>
inline auto sum_across(Lanes v) {
#if defined(__AVX512F__)
  const auto halves =
      __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const auto halves = v;
#endif
#if defined(__AVX2__)
  const auto quarters = __builtin_shufflevector(halves, halves, 0, 1, 2, 3) + __builtin_shufflevector(halves, halves, 4, 5, 6, 7);
#else
  const auto quarters = halves;
#endif
  const auto pairs = quarters + __builtin_shufflevector(quarters, quarters, 2, 3, 0, 1);
  return pairs[0] + pairs[1];
}

// Where the words of kLanes rows begin.
struct Rows {
  const char* at[kLanes];
};

#if defined(__AVX512F__)
typedef __m512i Quads;
inline Quads load_quads(const Rows& rows, int first, int64_t offset) {
  const auto quad = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows.at[first + r] + offset)); };
  const Quads two = _mm512_inserti32x4(_mm512_castsi128_si512(quad(0)), quad(4), 1);
  return _mm512_inserti32x4(_mm512_inserti32x4(two, quad(8), 2), quad(12), 3);
}
inline Quads low_words(Quads a, Quads b) { return _mm512_unpacklo_epi32(a, b); }
inline Quads high_words(Quads a, Quads b) { return _mm512_unpackhi_epi32(a, b); }
inline Quads low_pairs(Quads a, Quads b) { return _mm512_unpacklo_epi64(a, b); }
inline Quads high_pairs(Quads a, Quads b) { return _mm512_unpackhi_epi64(a, b); }
#elif defined(__AVX2__)
typedef __m256i Quads;
inline Quads load_quads(const Rows& rows, int first, int64_t offset) {
  const auto quad = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows.at[first + r] + offset)); };
  return _mm256_inserti128_si256(_mm256_castsi128_si256(quad(0)), quad(4), 1);
}
inline Quads low_words(Quads a, Quads b) { return _mm256_unpacklo_epi32(a, b); }
inline Quads high_words(Quads a, Quads b) { return _mm256_unpackhi_epi32(a, b); }
inline Quads low_pairs(Quads a, Quads b) { return _mm256_unpacklo_epi64(a, b); }
inline Quads high_pairs(Quads a, Quads b) { return _mm256_unpackhi_epi64(a, b); }
#endif

// Transposes `words` words of kLanes rows into a panel, each xor `flip`.
inline void pack_rows(const Rows& rows, int64_t words, uint32_t flip, uint32_t* panel) {
  int64_t w = 0;
#if defined(__AVX2__)
  // Four words of every row at a time: within each quarter of the vectors, four rows are transposed.
  for (; w + 4 <= words; w += 4, panel += 4 * kPackedRows) {
    const int64_t offset = w * static_cast<int64_t>(sizeof(uint32_t));
    const Quads row0 = load_quads(rows, 0, offset), row1 = load_quads(rows, 1, offset);
    const Quads row2 = load_quads(rows, 2, offset), row3 = load_quads(rows, 3, offset);
    const Quads low01 = low_words(row0, row1), low23 = low_words(row2, row3);
    const Quads high01 = high_words(row0, row1), high23 = high_words(row2, row3);
    store_words(reinterpret_cast<Words>(low_pairs(low01, low23)) ^ flip, panel);
    store_words(reinterpret_cast<Words>(high_pairs(low01, low23)) ^ flip, panel + kPackedRows);
    store_words(reinterpret_cast<Words>(low_pairs(high01, high23)) ^ flip, panel + 2 * kPackedRows);
    store_words(reinterpret_cast<Words>(high_pairs(high01, high23)) ^ flip, panel + 3 * kPackedRows);
  }
#endif
  for (; w < words; ++w, panel += kPackedRows) {
    for (int r = 0; r < kLanes; ++r) {
      memcpy(panel + r, rows.at[r] + w * static_cast<int64_t>(sizeof(uint32_t)), sizeof(uint32_t));
      panel[r] ^= flip;
    }
  }
}

// Tokens of a tile: where the words of the first begin, and how far apart the tokens are, in bytes.
struct TokenWords {
  const char* first;
  int64_t stride;
};

// Lines of memory to fetch while tiles are computed, for the next panel: `lines` of each of kPackedRows rows, which are `stride`
// bytes apart. Packing would else wait for memory, and memory for the products. They go to the second cache: the first is full.
struct Ahead {
  const char* first;
  int64_t stride, lines;
  int64_t at_once;  // lines to ask for at each word of a tile: more where few tokens make few tiles
  int64_t row = 0, line = 0;

  void fetch() {
    for (int64_t i = 0; i < at_once && row < kPackedRows; ++i) {
      __builtin_prefetch(first + row * stride + line * kLineBytes, 0, 2);
      if (++line == lines) {
        line = 0;
        ++row;
      }
    }
  }
};

// sums[t][v] += the products of `words` words of Tokens tokens and of the rows in vectors v of the panel. `Dots` says which
// products: Dots::add(sums, rows, token) of a vector of sums and two vectors of words.
template <class Dots, int Tokens>
inline void dot_words(TokenWords x, const uint32_t* panel, int64_t words, Ahead& ahead,
                      typename Dots::Sums (&sums)[Tokens][kTileVectors]) {
  for (int64_t w = 0; w < words; ++w, panel += kPackedRows) {
    ahead.fetch();
    Words rows[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) rows[v] = load_words(panel + v * kLanes);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      uint32_t word;
      memcpy(&word, x.first + t * x.stride + w * static_cast<int64_t>(sizeof word), sizeof word);
      const Words token = Words{} + word;
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sums[t][v] = Dots::add(sums[t][v], rows[v], token);
    }
  }
}

// Adds the products to the sums of Tokens tokens and kTileRows rows.
template <class Dots, int Tokens>
inline void add_products(TokenWords x, const uint32_t* panel, int64_t words, Ahead& ahead,
                         typename Dots::Sum (*sums)[kPackedRows]) {
  typename Dots::Sums tile[Tokens][kTileVectors] = {};
  dot_words<Dots, Tokens>(x, panel, words, ahead, tile);
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      typename Dots::Sums sum;
      memcpy(&sum, sums[t] + v * kLanes, sizeof sum);
      sum += tile[t][v];
      memcpy(sums[t] + v * kLanes, &sum, sizeof sum);
    }
  }
}

// What `width` features from feature k on contribute to a panel's rows. A `Product` knows the operands:
//
//   Sum, kWordValues, kFlip   type of the sums; features in a word; what packed words are xored with
//   kRowBits, row_at(row, k), row_stride()
//                             where weights lie, to fetch them ahead: bits of one, address, bytes between rows
//   begin_tokens(token, tokens), begin_features(row, rows, k, width)
//   row_words(row, k, width, buffer), token_words(token, tokens, k, width, buffer)
//                             words in place, or made in the buffer: kPackedWords a row or token
//   add<Tokens>(x, token, k, width, row, panel, ahead, sums)
//                             sums += products of Tokens tokens and kTileRows rows from `row` of the panel on
//   write(token, row, rows, sums)
template <class Product>
struct PanelTiles {
  Product& product;
  const uint32_t* panel;
  int64_t token, rows, k, width;
  typename Product::Sum (*sums)[kPackedRows];
  uint32_t* buffer;
  Ahead ahead;

  template <int Tokens>
  void run(int64_t t) {
    const TokenWords x = product.token_words(token + t, Tokens, k, width, buffer);
    for (int64_t row = 0; row < rows; row += kTileRows)
      product.template add<Tokens>(x, token + t, k, width, row, panel + row, ahead,
                                   reinterpret_cast<typename Product::Sum(*)[kPackedRows]>(sums[t] + row));
  }

  void run_all(int64_t tokens) {
    int64_t t = 0;
    for (; t + kTileTokens <= tokens; t += kTileTokens) run<kTileTokens>(t);
    switch (tokens - t) {
      case 1:
        return run<1>(t);
      case 2:
        return run<2>(t);
      case 3:
        return run<3>(t);
#if defined(__AVX512F__)
      case 4:
        return run<4>(t);
      case 5:
        return run<5>(t);
#endif
    }
  }
};

// Rows beyond `rows` repeat the last, up to whole vectors; vectors beyond those keep what they have. Nobody reads their sums.
template <class Product>
inline void pack_panel(const Product& product, int64_t row, int64_t rows, int64_t k, int64_t width, uint32_t* buffer,
                       uint32_t* panel) {
  const int64_t words = (width + Product::kWordValues - 1) / Product::kWordValues;
  for (int64_t strip = 0; strip < rows; strip += kLanes) {
    Rows at;
    for (int r = 0; r < kLanes; ++r)
      at.at[r] = product.row_words(row + smaller(strip + r, rows - 1), k, width, buffer + r * kPackedWords);
    pack_rows(at, words, Product::kFlip, panel + strip);
  }
}

// All outputs of rows first…last.
template <class Product>
inline void multiply_panels(Product& product, int64_t T, int64_t K, int64_t first, int64_t last) {
  constexpr int64_t kPackedK = kPackedWords * Product::kWordValues;
  alignas(64) uint32_t panel[kPackedWords * kPackedRows];
  alignas(64) typename Product::Sum sums[kBlockTokens][kPackedRows];
  alignas(64) uint32_t buffer[(kLanes > kTileTokens ? kLanes : kTileTokens) * kPackedWords];
  for (int64_t token = 0; token < T; token += kBlockTokens) {
    const int64_t tokens = smaller(kBlockTokens, T - token);
    product.begin_tokens(token, tokens);
    for (int64_t row = first; row < last; row += kPackedRows) {
      const int64_t rows = smaller(kPackedRows, last - row);
      memset(sums, 0, static_cast<size_t>(tokens) * sizeof sums[0]);
      for (int64_t k = 0; k < K; k += kPackedK) {
        const int64_t width = smaller(kPackedK, K - k);
        product.begin_features(row, rows, k, width);
        pack_panel(product, row, rows, k, width, buffer, panel);
        const bool more = k + kPackedK < K;
        const Ahead ahead{product.row_at(more ? row : row + kPackedRows, more ? k + kPackedK : 0), product.row_stride(),
                          kPackedK * Product::kRowBits / (8 * kLineBytes), tokens > 2 * kTileTokens ? 2 : 4};
        PanelTiles<Product>{product, panel, token, rows, k, width, sums, buffer, ahead}.run_all(tokens);
      }
      for (int64_t t = 0; t < tokens; ++t) product.write(token + t, row, rows, sums[t]);
    }
  }
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
