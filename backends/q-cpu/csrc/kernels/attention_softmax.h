// The running softmax of rows: their states, how states of later keys are merged in, and what becomes of them in the end.

#pragma once

#include "attention.h"
#include "attention_tile.h"
#include "vector_math.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int kTileVectors = kKeyTile / kLanes;

// Running softmax of a row: the largest score, and the sum of weights relative to it.
struct RowSums {
  float largest;
  float sum;
};

// Columns of outputs and of packed values.
inline int64_t columns_of(const PagedAttention& a) { return round_up(a.D, kLanes); }

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

// Scores of a row outside of begin…end, counted from the tile's first key, become -infinity.
inline void mask_scores(int64_t begin, int64_t end, Vector* scores) {
  Vector lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<float>(i);
  for (int v = 0; v < kTileVectors; ++v) {
    const Vector key = lane + static_cast<float>(v * kLanes);
    const Integers seen = (key >= static_cast<float>(begin)) & (key < static_cast<float>(end));
    scores[v] = seen ? scores[v] : Vector{} - __builtin_inff();
  }
}

// Weights relative to the largest score are 0 where there is no score as yet; subtracting its -infinity would give NaN.
inline float shift_of(float largest) { return largest == -__builtin_inff() ? 0.0f : largest; }

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

inline void merge(const PagedAttention& a, int64_t rows, const States& total, const States& range) {
  const int64_t columns = columns_of(a);
  for (int64_t r = 0; r < rows; ++r) {
    merge_row(&total.sums[r], total.outputs + r * columns, range.sums[r], range.outputs + r * columns, columns);
  }
}

template <class T>
void write_outputs(const PagedAttention& a, const AttentionItem& item, const States& states) {
  const int64_t columns = columns_of(a), ratio = a.H / a.G;
  for (int64_t r = 0; r < item.rows; ++r) {
    const int64_t token = a.query_start[item.request] + (item.row + r) / ratio;
    const int64_t head = item.group * ratio + (item.row + r) % ratio;
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
