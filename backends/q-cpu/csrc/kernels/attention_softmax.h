// The running softmax of rows: their states, how states of later keys are merged in, and what becomes of them in the end.

#pragma once

#include "attention.h"
#include "attention_tile.h"
#include "vector_math.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

// Running softmax of a row: the largest score, and the sum of weights relative to it.
struct RowSums {
  float largest;
  float sum;
};

// Columns of outputs and of packed values: as many as a pair of vectors has.
inline int64_t columns_of(const PagedAttention& a) { return round_up(a.D, 2 * kLanes); }

// Rows' outputs as yet without their division, [rows, columns], then their RowSums.
inline int64_t state_size(const PagedAttention& a, int64_t rows) { return round_up(rows * (columns_of(a) + 2), 16); }

struct States {
  float* outputs;
  RowSums* sums;

  States(const PagedAttention& a, int64_t rows, float* memory)
      : outputs(memory), sums(reinterpret_cast<RowSums*>(memory + rows * columns_of(a))) {}

  void clear(const PagedAttention& a, int64_t rows) const {
    memset(outputs, 0, static_cast<size_t>(rows * columns_of(a)) * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) sums[r] = {-__builtin_inff(), 0.0f};
  }
};

// Turns products of queries and keys into scores.
struct ScoreScale {
  bool coded, capped;
  float scale, cap;

  explicit ScoreScale(const PagedAttention& a)
      : coded(a.format != CacheFormat::dense),
        capped(a.softcap > 0),
        scale(static_cast<float>(a.scale * (capped ? 1.0 / a.softcap : 0x1.71547652b82fep0))),
        cap(static_cast<float>(a.softcap * 0x1.71547652b82fep0)) {}

  // The keys' own scales matter where the cache holds codes.
  Vector operator()(Vector products, Vector key_scales) const {
    Vector scores = (coded ? products * key_scales : products) * scale;
    if (capped) scores = tanh_lanes(scores) * cap;
    return scores;
  }
};

// first, first + 1, …
inline Vector ascending(int first) {
  Vector v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(first + i);
  return v;
}

// Scores of keys, numbered in the tile, outside of begin…end become -infinity.
inline Vector mask_scores(Vector scores, Vector key, Vector begin, Vector end) {
  const Integers seen = (key >= begin) & (key < end);
  return seen ? scores : Vector{} - __builtin_inff();
}

// Weights relative to the largest score are 0 where there is no score as yet; subtracting its -infinity would give NaN.
inline float shift_of(float largest) { return largest == -__builtin_inff() ? 0.0f : largest; }
inline Vector shift_of(Vector largest) { return largest == -__builtin_inff() ? Vector{} : largest; }

inline void scale_row(float* row, int64_t columns, float factor) {
  for (int64_t c = 0; c < columns; c += kLanes) write(load_vector(row + c) * factor, row + c);
}

// total = total merged with what a later range gave.
inline void merge_row(RowSums* total, float* total_outputs, const RowSums& range, const float* range_outputs, int64_t columns) {
  const float largest = larger(range.largest, total->largest);
  const float shift = shift_of(largest);
  const float keep = exp2_scalar(total->largest - shift), add = exp2_scalar(range.largest - shift);
  *total = {largest, total->sum * keep + range.sum * add};
  for (int64_t c = 0; c < columns; c += kLanes) {
    write(load_vector(total_outputs + c) * keep + load_vector(range_outputs + c) * add, total_outputs + c);
  }
}

inline void merge_states(const PagedAttention& a, int64_t rows, const States& total, const States& range) {
  const int64_t columns = columns_of(a);
  for (int64_t r = 0; r < rows; ++r) {
    merge_row(&total.sums[r], total.outputs + r * columns, range.sums[r], range.outputs + r * columns, columns);
  }
}

// The token and head of an item's row, counted over its groups.
struct Query {
  int64_t token, head;

  Query(const PagedAttention& a, const AttentionItem& item, int64_t r) {
    const int64_t ratio = a.H / a.G, row = item.row + r % item.rows;
    token = a.query_start[item.request] + row / ratio;
    head = (item.group + r / item.rows) * ratio + row % ratio;
  }
};

template <class T>
void write_outputs(const PagedAttention& a, const AttentionItem& item, const States& states) {
  const int64_t columns = columns_of(a);
  for (int64_t r = 0; r < item.groups * item.rows; ++r) {
    const auto [token, head] = Query(a, item, r);
    RowSums sums = states.sums[r];
    float factor = 1.0f;
    if (a.sinks_H != nullptr) {
      const float sink = a.sinks_H[head] * 0x1.715476p0f;
      const float largest = larger(sink, sums.largest);
      factor = exp2_scalar(sums.largest - largest);
      sums.sum = sums.sum * factor + exp2_scalar(sink - largest);
    }
    factor /= sums.sum;
    const float* outputs = states.outputs + r * columns;
    T* out = static_cast<T*>(a.out_THD) + (token * a.H + head) * a.D;
    int64_t d = 0;
    for (; d + kLanes <= a.D; d += kLanes) write(load_vector(outputs + d) * factor, out + d);
    if (d < a.D) write_part(load_vector(outputs + d) * factor, out + d, a.D - d);
  }
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
