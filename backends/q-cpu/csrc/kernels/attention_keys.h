// Which keys the rows of an item see, and where they and their scales lie in the paged cache.

#pragma once

#include "attention_softmax.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

// What an item's rows see.
struct Reach {
  int64_t ratio;       // query heads a kv head
  int64_t first_seen;  // position of the first query
  int64_t seq_len;
  bool causal;
  int64_t window;

  Reach(const PagedAttention& a, const AttentionItem& item) {
    const int64_t queries = a.query_start[item.request + 1] - a.query_start[item.request];
    ratio = a.H / a.G;
    seq_len = a.seq_lens[item.request];
    first_seen = seq_len - queries;
    causal = a.causal;
    window = a.window;
  }

  int64_t begin(int64_t row) const {
    const int64_t start = first_seen + row / ratio + 1 - window;
    return window == 0 || start < 0 ? 0 : start;
  }
  int64_t end(int64_t row) const { return causal ? first_seen + row / ratio + 1 : seq_len; }
};

// Slots of a tile's keys, numbered within all (block, kv head, offset); negative for those that are not to be read.
struct TileSlots {
  int64_t slot[kKeyTile];
};

// The slots of keys `tile`…`tile` + kKeyTile, as far as they are in begin…end.
inline void find_slots(const PagedAttention& a, const AttentionItem& item, int64_t tile, int64_t begin, int64_t end,
                       TileSlots* slots) {
  const int32_t* table = a.block_tables + item.request * a.table_width;
  int64_t i = tile < begin ? begin - tile : 0;
  const int64_t last = smaller(kKeyTile, end - tile);
  for (int64_t skipped = 0; skipped < i; ++skipped) slots->slot[skipped] = -1;
  while (i < last) {
    const int64_t offset = (tile + i) % a.S;
    const int64_t first = (table[(tile + i) / a.S] * a.G + item.group) * a.S + offset;
    const int64_t run = smaller(last - i, a.S - offset);
    for (int64_t n = 0; n < run; ++n) slots->slot[i + n] = first + n;
    i += run;
  }
  for (i = i < 0 ? 0 : i; i < kKeyTile; ++i) slots->slot[i] = -1;
}

// Finds the rows of slots in the kv head that comes `group` after the slots' own.
template <class C>
inline void find_rows(const PagedAttention& a, const TileSlots& slots, int64_t group, const void* zeros, TileRows* rows) {
  const C* const keys = static_cast<const C*>(a.k_cache_BGSD) + group * a.S * a.D;
  const C* const values = static_cast<const C*>(a.v_cache_BGSD) + group * a.S * a.D;
  for (int64_t i = 0; i < kKeyTile; ++i) {
    const int64_t slot = slots.slot[i];
    rows->key[i] = slot < 0 ? zeros : static_cast<const void*>(keys + slot * a.D);
    rows->value[i] = slot < 0 ? zeros : static_cast<const void*>(values + slot * a.D);
  }
}

// Factors of a tile's scores and weights, where the cache holds codes.
struct Scales {
  float key[kKeyTile];
  float value[kKeyTile];
};

inline void read_scales(const PagedAttention& a, const TileSlots& slots, int64_t group, Scales* scales) {
  if (a.format == CacheFormat::dense) return;
  const float peak = a.format == CacheFormat::int8 ? 127.0f : 448.0f;
  for (int64_t i = 0; i < kKeyTile; ++i) {
    const int64_t slot = slots.slot[i] + group * a.S;
    scales->key[i] = slots.slot[i] < 0 ? 0.0f : a.k_scale_BGS[slot];
    scales->value[i] = slots.slot[i] < 0 ? 0.0f : a.v_scale_BGS[slot];
  }
  for (int64_t i = 0; i < kKeyTile; ++i) {
    scales->key[i] /= peak;
    scales->value[i] /= peak;
  }
}

// A thread's buffers. Neither operand of a product is deeper than the outputs have columns.
struct Scratch {
  float* queries;  // [kRowTile, columns]
  float* keys;     // [kKeyTile, columns]
  float* values;   // [kKeyTile, columns]
  float* range;    // states of the current range
  float* total;    // and of those before
  float* zeros;    // a row

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

// The tiles of an item's keys in a range, in order: calls attend(tile, slots, next tile's slots).
template <class Attend>
inline void for_each_tile(const PagedAttention& a, const AttentionItem& item, const Reach& reach, int64_t range, Attend&& attend) {
  const int64_t begin = reach.begin(item.row), end = reach.end(item.row + item.rows - 1);
  const int64_t range_end = smaller((range + 1) * kKeyRange, end);
  int64_t tile = range * kKeyRange > begin ? range * kKeyRange : begin / kKeyTile * kKeyTile;
  TileSlots slots, next;
  find_slots(a, item, tile, begin, range_end, &slots);
  for (; tile < range_end; tile += kKeyTile) {
    find_slots(a, item, tile + kKeyTile, begin, range_end, &next);
    attend(tile, slots, next);
    slots = next;
  }
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
