// Products of a few tokens with 4-bit weights, for AVX-512: rows stream through the registers at the speed of memory.
//
// 64 bytes are a group of 128 codes of a row. As 32 words (or 16 double words), shifts by multiples of 4 bring one code of each
// into the low bits, and a look-up in a register turns those into values: 4 vectors of bfloat16 (8 of float32). Activations are put
// into the same order once. In either order lane d gets features 8 d … 8 d + 7 of the group, so the scales of the blocks, whatever
// their size, enter as a vector that the group's sums are multiplied with.

#pragma once

#if defined(__AVX512BF16__)

#include "ahead.h"
#include "four_bit_panel.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int64_t kGroup = 128;
constexpr int64_t kLaneCodes = 8;           // codes of a group that meet in a lane
constexpr int64_t kPrefetchBytes = 8192;    // ahead in one stream: several rows at a time were slower
constexpr int64_t kOrderedBytes = 1 << 17;  // activations put in order at a time
constexpr int64_t kCachedBytes = 1 << 15;   // of which stay in L1
constexpr int64_t kStreamRows = 64;         // rows that they serve
constexpr int kStreamTokens = 8;

// Look-ups of bfloat16 values in words, and dot products of pairs.
struct StreamBf16 {
  typedef Bf16 Number;
  typedef uint16_t Codes __attribute__((vector_size(64)));
  typedef __m512i Operand;
  static constexpr int kRows = 2;  // that share a load of activations
  static constexpr int kVectors = 4;
  static constexpr int64_t kStep = kGroup / kVectors;

  Operand table;

  explicit StreamBf16(const FourBitBook& book) : table(scaled_table(book, 1.0f)) {}

  Operand look_up(Codes codes) const { return _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(codes), table); }
  static Operand load(const Number* x) { return _mm512_load_si512(x); }
  static __m512 multiply_add(Operand w, Operand x, __m512 sums) {
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
};

// Look-ups of float32 values in double words.
struct StreamFloat {
  typedef float Number;
  typedef uint32_t Codes __attribute__((vector_size(64)));
  typedef __m512 Operand;
  static constexpr int kRows = 1;
  static constexpr int kVectors = 8;
  static constexpr int64_t kStep = kGroup / kVectors;

  Operand table;

  explicit StreamFloat(const FourBitBook& book) : table(_mm512_loadu_ps(book.values)) {}

  Operand look_up(Codes codes) const { return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(codes), table); }
  static Operand load(const Number* x) { return _mm512_load_ps(x); }
  static __m512 multiply_add(Operand w, Operand x, __m512 sums) { return _mm512_fmadd_ps(w, x, sums); }
};

// The scales of a group's lanes.
struct LaneScales {
  const float* absmax;
  int shift;            // log2 of the blocksize
  int blocks;           // that a group has scales of, if it begins with a block or lies in one
  __m512i lane_blocks;  // of such a group

  explicit LaneScales(const FourBitWeight& w) : absmax(w.absmax), shift(w.shift) {
    const int64_t in_group = kGroup >> shift;
    blocks = static_cast<int>(in_group > 1 ? in_group : 1);
    lane_blocks = blocks_from(0);
  }

  __m512i blocks_from(int64_t inside) const {
    const __m512i lanes = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    return _mm512_srl_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(inside))), _mm_cvtsi32_si128(shift));
  }

  // Plain loads: masked ones are slower here than all the rest of a group.
  __m512 of_aligned(int64_t first) const {
    const float* from = absmax + (first >> shift);
    __m512 scales;
    switch (blocks) {
      case 1:
        return _mm512_set1_ps(*from);
      case 2:
        scales = _mm512_castps128_ps512(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
        break;
      case 4:
        scales = _mm512_castps128_ps512(_mm_loadu_ps(from));
        break;
      default:
        scales = _mm512_castps256_ps512(_mm256_loadu_ps(from));
    }
    return _mm512_permutexvar_ps(lane_blocks, scales);
  }

  // Of `count` codes from anywhere that no lane has a block's end in; lanes after them get 0.
  __m512 of_any(int64_t first, int64_t count) const {
    const int64_t inside = first & ((int64_t{1} << shift) - 1);
    const __m512 scales = _mm512_maskz_loadu_ps(first_lanes(((inside + count - 1) >> shift) + 1), absmax + (first >> shift));
    return _mm512_maskz_permutexvar_ps(first_lanes(count / kLaneCodes), blocks_from(inside), scales);
  }
};

// Adds a group's products: of Rows rows, with Tokens tokens.
template <class S, int Rows, int Tokens>
inline void add_group(const S& s, __m512i (&bytes)[Rows], const __m512 (&scales)[Rows], const typename S::Number* x,
                      __m512 (&sums)[Rows][Tokens]) {
  typename S::Operand w[Rows][S::kVectors];
#pragma GCC unroll 2
  for (int r = 0; r < Rows; ++r) {
    asm("" : "+v"(bytes[r]));  // else gcc loads them anew for each shift
    const typename S::Codes codes = reinterpret_cast<typename S::Codes>(bytes[r]);
#pragma GCC unroll 8
    for (int v = 0; v < S::kVectors; ++v) w[r][v] = s.look_up(codes >> (4 * v));
  }
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
    __m512 group[Rows] = {};
#pragma GCC unroll 8
    for (int v = 0; v < S::kVectors; ++v) {
      const typename S::Operand token = S::load(x + t * kGroup + v * S::kStep);
#pragma GCC unroll 2
      for (int r = 0; r < Rows; ++r) group[r] = S::multiply_add(w[r][v], token, group[r]);
    }
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r) sums[r][t] = _mm512_fmadd_ps(group[r], scales[r], sums[r][t]);
  }
}

// Adds the products of `width` features with activations in order to the sums of Rows rows, whose features begin at `first` of the
// flat weight and K after it.
template <class S, int Rows, int Tokens, bool Aligned>
inline void stream_rows(const S& s, const LaneScales& scales, const FourBitWeight& w, int64_t first, int64_t width,
                        const typename S::Number* x, __m512 (*out)[Tokens]) {
  __m512 sums[Rows][Tokens];
  memcpy(sums, out, sizeof sums);
  const uint8_t* from = w.packed + first / 2;
  for (int r = 0; r < Rows; ++r) {
    look_up_pages(from + r * w.K / 2 + kPagesAheadBytes, width / 2);
    look_up_pages(w.absmax + ((first + r * w.K) >> w.shift) + kPagesAheadBytes / 8, (width >> w.shift) * 4);
  }
  __m512i bytes[Rows];
  __m512 lanes[Rows];
  const int64_t last = first + width;
  for (; first + kGroup <= last; first += kGroup, from += kGroup / 2, x += Tokens * kGroup) {
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r) {
      _mm_prefetch(from + r * w.K / 2 + kPrefetchBytes, _MM_HINT_T0);
      bytes[r] = _mm512_loadu_si512(from + r * w.K / 2);
      lanes[r] = Aligned ? scales.of_aligned(first + r * w.K) : scales.of_any(first + r * w.K, kGroup);
    }
    add_group<S, Rows, Tokens>(s, bytes, lanes, x, sums);
  }
  if (!Aligned && first < last) {
    for (int r = 0; r < Rows; ++r) {
      bytes[r] = _mm512_maskz_loadu_epi8((uint64_t{1} << ((last - first) / 2)) - 1, from + r * w.K / 2);
      lanes[r] = scales.of_any(first + r * w.K, last - first);
    }
    add_group<S, Rows, Tokens>(s, bytes, lanes, x, sums);
  }
  memcpy(out, sums, sizeof sums);
}

// Puts features k…k + width of all tokens in order, group by group, token by token. The high nibble of a byte is its first code.
template <class S, class X>
inline void order_activations(const X* x_TK, int64_t T, int64_t K, int64_t k, int64_t width, typename S::Number* ordered) {
  for (int64_t first = 0; first < width; first += kGroup) {
    for (int64_t t = 0; t < T; ++t, ordered += kGroup) {
      alignas(64) float group[kGroup] = {};
      const X* from = x_TK + t * K + k + first;
      const int64_t count = smaller(kGroup, width - first);
      for (int64_t i = 0; i < count; i += kLanes) {
        const Vector part = load_some_floats(from + i, smaller(kLanes, count - i));
        memcpy(group + i, &part, sizeof part);
      }
      float shuffled[kGroup];
      for (int64_t i = 0; i < S::kStep; ++i) {
        for (int v = 0; v < S::kVectors; ++v) shuffled[v * S::kStep + i] = group[i * S::kVectors + (v ^ 1)];
      }
      to_numbers(shuffled, kGroup, ordered);
    }
  }
}

template <class S, class X, int Tokens, bool Aligned>
inline void stream_tokens(const Product& a, const FourBitWeight& w, int64_t row_begin, int64_t row_end) {
  constexpr int kRows = Tokens > 2 ? S::kRows : 1;
  constexpr int64_t kFeatureBytes = Tokens * static_cast<int64_t>(sizeof(typename S::Number));
  constexpr int64_t kCached = kCachedBytes / kFeatureBytes / kGroup * kGroup;
  constexpr int64_t kOrdered = kOrderedBytes / kCachedBytes * kCached;
  alignas(64) typename S::Number ordered[kOrdered * Tokens];
  __m512 sums[kStreamRows][Tokens];
  const S s(*w.book);
  const LaneScales scales(w);
  const X* x = static_cast<const X*>(a.x_TK);
  int64_t in_order = -1;  // where the features begin that are
  for (int64_t row = row_begin; row < row_end; row += kStreamRows) {
    const int64_t rows = smaller(kStreamRows, row_end - row);
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < a.K; k += kCached) {
      const int64_t width = smaller(kCached, a.K - k);
      const int64_t begin = k / kOrdered * kOrdered;
      if (in_order != begin) order_activations<S>(x, Tokens, a.K, begin, smaller(kOrdered, a.K - begin), ordered);
      in_order = begin;
      const typename S::Number* part = ordered + (k - begin) * Tokens;
      int64_t r = 0;
      for (; r + kRows <= rows; r += kRows) {
        stream_rows<S, kRows, Tokens, Aligned>(s, scales, w, (row + r) * a.K + k, width, part, sums + r);
      }
      for (; r < rows; ++r) {
        stream_rows<S, 1, Tokens, Aligned>(s, scales, w, (row + r) * a.K + k, width, part, sums + r);
      }
    }
    float bias_buffer[kStreamRows];
    const float* bias = a.bias_N ? load(a.bias_N, a.dtype, row, rows, bias_buffer) : nullptr;
    for (int t = 0; t < Tokens; ++t) {
      float values[kStreamRows];
      for (int64_t r = 0; r < rows; ++r) values[r] = _mm512_reduce_add_ps(sums[r][t]) + (bias ? bias[r] : 0.0f);
      store(values, rows, a.out_TN, a.out_dtype, t * a.N + row);
    }
  }
}

template <class S, class X, int Tokens>
inline void stream_some(const Product& a, const FourBitWeight& w, int64_t first, int64_t last) {
  if (a.K % kGroup == 0) return stream_tokens<S, X, Tokens, true>(a, w, first, last);
  return stream_tokens<S, X, Tokens, false>(a, w, first, last);
}

// Whether `stream` takes a product: rows must begin with a lane's codes, and more than one token's activations be put in order
// once.
inline bool can_stream(const Product& a) {
  if (a.T < 1 || a.T > kStreamTokens || a.K % kLaneCodes != 0) return false;
  const int64_t number = a.dtype == Float::bf16 ? sizeof(StreamBf16::Number) : sizeof(StreamFloat::Number);
  return a.T == 1 || a.K <= kOrderedBytes / (a.T * number) / kGroup * kGroup;
}

template <class S, class X>
inline void stream(const Product& a, const FourBitWeight& w, int64_t first, int64_t last) {
  switch (a.T) {
    case 1:
      return stream_some<S, X, 1>(a, w, first, last);
    case 2:
      return stream_some<S, X, 2>(a, w, first, last);
    case 3:
      return stream_some<S, X, 3>(a, w, first, last);
    case 4:
      return stream_some<S, X, 4>(a, w, first, last);
    case 5:
      return stream_some<S, X, 5>(a, w, first, last);
    case 6:
      return stream_some<S, X, 6>(a, w, first, last);
    case 7:
      return stream_some<S, X, 7>(a, w, first, last);
    default:
      return stream_some<S, X, kStreamTokens>(a, w, first, last);
  }
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL

#endif
