// Attention of many rows to the keys of one kv head, such as those of a prefill: keys and values are packed once a tile, and
// multiplied by panels of rows.

#pragma once

#include "attention_keys.h"
#include "attention_packed.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

// Attention of activations Q over a cache of elements C, multiplied in a kind of tile.
template <class Tile, class Q, class C>
struct ManyRows {
  const PagedAttention& a;
  const Scratch& scratch;
  const AttentionItem& item;
  const Reach reach{a, item};
  const ScoreScale score_scale{a};
  const int64_t columns = columns_of(a);
  const int64_t depth = (a.D + Tile::kDepth - 1) / Tile::kDepth;  // of scores
  static constexpr int64_t kWeightDepth = kKeyTile / Tile::kDepth;

  void load_queries() const {
    for (int64_t r = 0; r < item.rows; ++r) {
      const auto [token, head] = Query(a, item, r);
      const Q* q = static_cast<const Q*>(a.q_THD) + token * a.q_token_stride + head * a.q_head_stride;
      float* out = scratch.queries + r * depth;
      for (int64_t k = 0; k < depth; k += kLanes) {
        const Vector lanes = read_some_lanes<Tile>(q + k * Tile::kDepth, a.D - k * Tile::kDepth);
        memcpy(out + k, &lanes, static_cast<size_t>(smaller(kLanes, depth - k)) * sizeof(float));
      }
    }
  }

  // Turns a row's scores into weights relative to the new largest score, and brings its sums and outputs to it.
  void update_row(Vector* scores, RowSums* sums, float* outputs) const {
    Vector largest_lanes = scores[0];
    for (int v = 1; v < kTileVectors; ++v) largest_lanes = larger(scores[v], largest_lanes);
    const float largest = larger(largest_lane(largest_lanes), sums->largest);
    const float shift = shift_of(largest);
    Vector weight_sums = {};
    for (int v = 0; v < kTileVectors; ++v) {
      scores[v] = exp2_lanes(scores[v] - shift);
      weight_sums += scores[v];
    }
    if (largest != sums->largest) {
      const float keep = exp2_scalar(sums->largest - shift);
      sums->sum *= keep;
      scale_row(outputs, columns, keep);
    }
    *sums = {largest, sums->sum + sum_lanes(weight_sums)};
  }

  void mask_row(int64_t begin, int64_t end, Vector* scores) const {
    if (begin <= 0 && end >= kKeyTile) return;
    const Vector first = broadcast(static_cast<float>(begin)), last = broadcast(static_cast<float>(end));
    for (int v = 0; v < kTileVectors; ++v) scores[v] = mask_scores(scores[v], ascending(v * kLanes), first, last);
  }

  // Weights of a panel's keys, packed for the second product; its sums and outputs are brought to the new largest scores.
  void weigh_panel(int64_t tile, int64_t row, int64_t rows, const float* queries, const Scales& scales, RowSums* sums,
                   float* outputs, float* weights) const {
    alignas(64) float products[kPanelRows * kKeyTile];
    multiply_keys<Tile>(rows, queries, depth, scratch.keys, products);
    for (int64_t r = 0; r < rows; ++r) {
      Vector scores[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) {
        scores[v] = score_scale(load_vector(products + r * kKeyTile + v * kLanes), load_vector(scales.key + v * kLanes));
      }
      mask_row(reach.begin(row + r) - tile, reach.end(row + r) - tile, scores);
      update_row(scores, sums + r, outputs + r * columns);
      for (int v = 0; score_scale.coded && v < kTileVectors; ++v) scores[v] *= load_vector(scales.value + v * kLanes);
      Tile::store_weights(scores, weights + r * kWeightDepth);
    }
  }

  void attend_tile(int64_t tile, const TileSlots& slots, const States& states) const {
    TileRows rows;
    Scales scales;
    find_rows<C>(a, slots, 0, scratch.zeros, &rows);
    read_scales(a, slots, 0, &scales);
    pack_keys<Tile, C>(rows.key, a.D, scratch.keys);
    pack_values<Tile, C>(rows.value, a.D, scratch.values, columns);
    alignas(64) float weights[kPanelRows * kWeightDepth];
    for (int64_t r = 0; r < item.rows; r += kPanelRows) {
      const int64_t count = smaller(kPanelRows, item.rows - r), row = item.row + r;
      if (reach.begin(row) >= tile + kKeyTile || reach.end(row + count - 1) <= tile) continue;
      float* outputs = states.outputs + r * columns;
      weigh_panel(tile, row, count, scratch.queries + r * depth, scales, states.sums + r, outputs, weights);
      add_values<Tile>(count, weights, scratch.values, columns, outputs);
    }
  }

  void attend_range(int64_t range, const States& states) const {
    states.clear(a, item.rows);
    for_each_tile(a, item, reach, range,
                  [&](int64_t tile, const TileSlots& slots, const TileSlots&) { attend_tile(tile, slots, states); });
  }
};

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
