// Attention over a paged KV cache, with an online softmax (arXiv 2205.14135, 2307.08691).
//
// A row's result depends on its query, its position and its sequence alone, bit for bit: not on the queries, heads and requests beside
// it, on how they are cut into items, or on the number of threads. For that, keys are always taken in tiles and ranges that are
// counted from the sequence's start; a tile that a row doesn't see leaves its state as it is; and ranges are merged in their order,
// whether one item had them all or each had its own. So decoding a token gives what prefilling it gave.
//
// In the activations' bfloat16 (AVX-512) products of bfloat16 are exact and summed in float32; the weights of the second product are
// rounded to bfloat16. Everything else is float32. Scores are in units of log 2, so that the softmax is one of powers of 2.

#include "attention.h"

#include "attention_keys.h"
#include "kv_cache.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

// A thread's buffers.
struct Scratch {
  float* queries;  // [kRowTile, depth]
  float* keys;     // [depth, kKeyTile]
  float* values;   // [kKeyTile, columns]
  float* range;    // states of the current range
  float* total;    // and of those before
  float* zeros;    // a row

  // Neither operand is deeper than the outputs have columns.
  Scratch(const PagedAttention& a, float* memory) {
    queries = memory;
    keys = queries + kRowTile * columns_of(a);
    values = keys + kKeyTile * columns_of(a);
    range = values + kKeyTile * columns_of(a);
    total = range + state_size(a, kRowTile);
    zeros = total + state_size(a, kRowTile);
  }

  static int64_t size(const PagedAttention& a) {
    return (kRowTile + 2 * kKeyTile + 1) * columns_of(a) + 2 * state_size(a, kRowTile);
  }
};

// Attention of activations Q over a cache of elements C, multiplied in a kind of tile.
template <class Tile, class Q, class C>
struct Attend {
  const PagedAttention& a;
  const Scratch& scratch;
  const int64_t columns = columns_of(a);
  const int64_t depth = (a.D + Tile::kDepth - 1) / Tile::kDepth;  // of scores
  const int64_t row_bytes = a.D * static_cast<int64_t>(sizeof(C));
  static constexpr int64_t kWeightDepth = kKeyTile / Tile::kDepth;
  const float score_scale = static_cast<float>(a.scale * (a.softcap > 0 ? 1.0 / a.softcap : 0x1.71547652b82fep0));
  const float cap_scale = static_cast<float>(a.softcap * 0x1.71547652b82fep0);

  void load_queries(const AttentionItem& item) const {
    const int64_t ratio = a.H / a.G;
    for (int64_t r = 0; r < item.rows; ++r) {
      const int64_t token = a.query_start[item.request] + (item.row + r) / ratio;
      const int64_t head = item.group * ratio + (item.row + r) % ratio;
      const Q* q = static_cast<const Q*>(a.q_THD) + token * a.q_token_stride + head * a.q_head_stride;
      float* out = scratch.queries + r * depth;
      for (int64_t k = 0; k < depth; k += kLanes) {
        const Vector lanes = read_some_lanes<Tile>(q + k * Tile::kDepth, a.D - k * Tile::kDepth);
        memcpy(out + k, &lanes, static_cast<size_t>(smaller(kLanes, depth - k)) * sizeof(float));
      }
    }
  }

  // Turns a row's products into scores.
  void finish_scores(Vector* scores, const Vector* key_scales) const {
    for (int v = 0; v < kTileVectors; ++v) {
      if (a.format != CacheFormat::dense) scores[v] *= key_scales[v];
      scores[v] *= score_scale;
      if (a.softcap > 0) scores[v] = tanh_lanes(scores[v]) * cap_scale;
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

  // Weights of a panel's keys, packed for the second product; its sums and outputs are brought to the new largest scores.
  void weigh_panel(const Reach& reach, int64_t tile, int64_t row, int64_t rows, const float* queries, const Scales& scales,
                   RowSums* sums, float* outputs, float* weights, Ahead& ahead) const {
    alignas(64) float products[kPanelRows * kKeyTile];
    multiply_panel<Tile, false>(rows, queries, depth, scratch.keys, kKeyTile, depth, products, ahead);
    for (int64_t r = 0; r < rows; ++r) {
      Vector scores[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) scores[v] = load_vector(products + r * kKeyTile + v * kLanes);
      finish_scores(scores, scales.key);
      const int64_t begin = reach.begin(row + r) - tile, end = reach.end(row + r) - tile;
      if (begin > 0 || end < kKeyTile) mask_scores(begin, end, scores);
      update_row(scores, sums + r, outputs + r * columns);
      for (int v = 0; a.format != CacheFormat::dense && v < kTileVectors; ++v) scores[v] *= scales.value[v];
      Tile::store_weights(scores, weights + r * kWeightDepth);
    }
  }

  void attend_tile(const AttentionItem& item, const Reach& reach, int64_t tile, const Scales& scales, const TileRows& rows,
                   const TileRows& next, const States& states) const {
    alignas(64) float weights[kPanelRows * kWeightDepth];
    Ahead keys_ahead(next.key, row_bytes), values_ahead(next.value, row_bytes);
    pack_keys<Tile, C>(rows.key, a.D, scratch.keys, keys_ahead);
    // With a single panel, such as in decoding, the keys are done with when the values come. One buffer for both then leaves L1 to
    // what is fetched ahead.
    const bool single = item.rows <= kPanelRows;
    float* values = single ? scratch.keys : scratch.values;
    if (!single) Tile::template pack_values<C>(rows.value, a.D, values, columns, values_ahead);
    for (int64_t r = 0; r < item.rows; r += kPanelRows) {
      const int64_t count = smaller(kPanelRows, item.rows - r), row = item.row + r;
      if (reach.begin(row) >= tile + kKeyTile || reach.end(row + count - 1) <= tile) continue;
      float* outputs = states.outputs + r * columns;
      weigh_panel(reach, tile, row, count, scratch.queries + r * depth, scales, states.sums + r, outputs, weights, keys_ahead);
      if (single) Tile::template pack_values<C>(rows.value, a.D, values, columns, values_ahead);
      multiply_panel<Tile, true>(count, weights, kWeightDepth, values, columns, kWeightDepth, outputs, values_ahead);
    }
  }

  void find_rows(const TileSlots& slots, TileRows* rows) const {
    for (int64_t i = 0; i < kKeyTile; ++i) {
      const int64_t slot = slots.slot[i];
      rows->key[i] = slot < 0 ? scratch.zeros : static_cast<const void*>(static_cast<const C*>(a.k_cache_BGSD) + slot * a.D);
      rows->value[i] = slot < 0 ? scratch.zeros : static_cast<const void*>(static_cast<const C*>(a.v_cache_BGSD) + slot * a.D);
    }
  }

  void attend_range(const AttentionItem& item, const Reach& reach, int64_t range, const States& states) const {
    const int64_t begin = reach.begin(item.row), end = reach.end(item.row + item.rows - 1);
    const int64_t range_end = smaller((range + 1) * kKeyRange, end);
    int64_t tile = range * kKeyRange > begin ? range * kKeyRange : begin / kKeyTile * kKeyTile;
    TileSlots slots;
    TileRows rows[2];
    Scales scales[2];
    const auto find = [&](int64_t from, int which) {
      find_slots(a, item, from, begin, range_end, &slots);
      find_rows(slots, &rows[which]);
      read_scales(a, slots, &scales[which]);
      // Page addresses first: looking them up takes longer than what follows.
      for (int64_t i = 0; i < kKeyTile; i += 16) {
        __builtin_prefetch(rows[which].key[i]);
        __builtin_prefetch(rows[which].value[i]);
      }
    };
    find(tile, 0);
    for (int turn = 0; tile < range_end; tile += kKeyTile, turn ^= 1) {
      // The first tile of the next range is not fetched early: another thread may have that range.
      find(tile + kKeyTile, turn ^ 1);
      attend_tile(item, reach, tile, scales[turn], rows[turn], rows[turn ^ 1], states);
    }
  }

  void attend(const AttentionItem& item) const {
    const Reach reach(a, item);
    const States range(a, item.rows, scratch.range), total(a, item.rows, scratch.total);
    load_queries(item);
    if (item.states != nullptr) {
      for (int64_t i = item.first_range; i < item.last_range; ++i) {
        const States own(a, item.rows, item.states + (i - item.first_range) * state_size(a, item.rows));
        own.clear(a, item.rows);
        attend_range(item, reach, i, own);
      }
      return;
    }
    total.clear(a, item.rows);
    for (int64_t i = item.first_range; i < item.last_range; ++i) {
      range.clear(a, item.rows);
      attend_range(item, reach, i, range);
      merge(a, item.rows, total, range);
    }
    write_outputs<Q>(a, item, total);
  }
};

template <class Tile, class Q, class C>
void attend_items(const PagedAttention& a, const AttentionItem* items, int64_t first, int64_t last, const Scratch& scratch) {
  const Attend<Tile, Q, C> work{a, scratch};
  for (int64_t i = first; i < last; ++i) work.attend(items[i]);
}

template <class Tile, class Q>
void attend_format(const PagedAttention& a, const AttentionItem* items, int64_t first, int64_t last, const Scratch& scratch) {
  switch (a.format) {
    case CacheFormat::dense:
      return attend_items<Tile, Q, Q>(a, items, first, last, scratch);
    case CacheFormat::int8:
      return attend_items<Tile, Q, int8_t>(a, items, first, last, scratch);
    case CacheFormat::e4m3:
      return attend_items<Tile, Q, E4m3>(a, items, first, last, scratch);
  }
}

int64_t scratch_floats(const PagedAttention& a) { return Scratch::size(a); }

int64_t state_floats(const PagedAttention& a, int64_t rows) { return state_size(a, rows); }

void attend(const PagedAttention& a, const AttentionItem* items, int64_t first, int64_t last, float* memory) {
  const Scratch scratch(a, memory);
  memset(scratch.zeros, 0, static_cast<size_t>(columns_of(a)) * sizeof(float));
  switch (a.dtype) {
    case Float::f32:
      return attend_format<WideTile, float>(a, items, first, last, scratch);
    case Float::f16:
      return attend_format<WideTile, F16>(a, items, first, last, scratch);
    case Float::bf16:
#if defined(__AVX512BF16__)
      return attend_format<PairTile, Bf16>(a, items, first, last, scratch);
#else
      return attend_format<WideTile, Bf16>(a, items, first, last, scratch);
#endif
  }
}

void combine(const PagedAttention& a, const AttentionItem* items, int64_t first, int64_t last, float* memory) {
  for (int64_t i = first; i < last; ++i) {
    const AttentionItem& item = items[i];
    const States total(a, item.rows, Scratch(a, memory).total);
    total.clear(a, item.rows);
    for (int64_t range = 0; range < item.last_range - item.first_range; ++range) {
      merge(a, item.rows, total, States(a, item.rows, item.states + range * state_size(a, item.rows)));
    }
    with_element(a.dtype, [&](auto element) { write_outputs<decltype(element)>(a, item, total); });
  }
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {write_kv, copy_blocks, scratch_floats, state_floats, attend, combine};

}  // namespace q_cpu::Q_CPU_LEVEL
