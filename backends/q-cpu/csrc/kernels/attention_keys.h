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
inline void find_slots(const PagedAttention& a, const AttentionItem& item, int64_t tile, int64_t begin, int64_t end, TileSlots* slots) {
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

// Factors of a tile's scores and weights, where the cache holds codes.
struct Scales {
  Vector key[kTileVectors];
  Vector value[kTileVectors];
};

inline void read_scales(const PagedAttention& a, const TileSlots& slots, Scales* scales) {
  if (a.format == CacheFormat::dense) return;
  const float peak = a.format == CacheFormat::int8 ? 127.0f : 448.0f;
  float key[kKeyTile], value[kKeyTile];
  for (int64_t i = 0; i < kKeyTile; ++i) {
    key[i] = slots.slot[i] < 0 ? 0.0f : a.k_scale_BGS[slots.slot[i]] / peak;
    value[i] = slots.slot[i] < 0 ? 0.0f : a.v_scale_BGS[slots.slot[i]] / peak;
  }
  memcpy(scales->key, key, sizeof key);
  memcpy(scales->value, value, sizeof value);
}

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
