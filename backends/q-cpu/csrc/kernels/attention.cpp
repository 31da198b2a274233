// Attention over a paged KV cache, with an online softmax (arXiv 2205.14135, 2307.08691).
//
// A row's result depends on its query, its position and its sequence alone, bit for bit: not on the queries, heads and requests
// beside it, on how they are cut into items, or on the number of threads. For that, keys are always taken in tiles and ranges that
// are counted from the sequence's start; a tile that a row doesn't see leaves its state as it is; and ranges are merged in their
// order, whether one item had them all or each had its own. So decoding a token gives what prefilling it gave.
//
// In the activations' bfloat16 (AVX-512) products of bfloat16 are exact and summed in float32; the weights of the second product
// are rounded to bfloat16. Everything else is float32. Scores are in units of log 2, so that the softmax is one of powers of 2.

#include "attention.h"

#include "attention_few.h"
#include "attention_many.h"
#include "kv_cache.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

template <class Work, class Q>
void attend_item(const PagedAttention& a, const AttentionItem& item, const Scratch& scratch) {
  const Work work{a, scratch, item};
  const int64_t rows = item.groups * item.rows;
  work.load_queries();
  if (item.states != nullptr) {
    for (int64_t i = item.first_range; i < item.last_range; ++i) {
      work.attend_range(i, States(a, rows, item.states + (i - item.first_range) * state_size(a, rows)));
    }
    return;
  }
  const States range(a, rows, scratch.range), total(a, rows, scratch.total);
  total.clear(a, rows);
  for (int64_t i = item.first_range; i < item.last_range; ++i) {
    work.attend_range(i, range);
    merge_states(a, rows, total, range);
  }
  write_outputs<Q>(a, item, total);
}

template <class Tile, class Q, class C>
void attend_items(const PagedAttention& a, const AttentionItem* items, int64_t first, int64_t last, const Scratch& scratch) {
  for (int64_t i = first; i < last; ++i) {
    if (items[i].rows <= kFewRows) {
      attend_item<FewRows<Tile, Q, C>, Q>(a, items[i], scratch);
    } else {
      attend_item<ManyRows<Tile, Q, C>, Q>(a, items[i], scratch);
    }
  }
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
    const int64_t rows = item.groups * item.rows;
    const States total(a, rows, Scratch(a, memory).total);
    total.clear(a, rows);
    for (int64_t range = 0; range < item.last_range - item.first_range; ++range) {
      merge_states(a, rows, total, States(a, rows, item.states + range * state_size(a, rows)));
    }
    with_element(a.dtype, [&](auto element) { write_outputs<decltype(element)>(a, item, total); });
  }
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {write_kv, copy_blocks, scratch_floats, state_floats, attend, combine};

}  // namespace q_cpu::Q_CPU_LEVEL
