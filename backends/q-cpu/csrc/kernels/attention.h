// The paged KV cache, and attention over it.
// Letters: T tokens, R requests, H heads, G kv heads, D head dim, B blocks, S slots of a block.
//
// The query heads that share a kv head form a group; a request has, a group, one *row* for each of its queries and heads, queries
// outermost: row = query * (H / G) + head.

#pragma once

#include "kernels.h"

namespace q_cpu {

// What the cache holds: the activations' dtype, or codes with a scale a slot and head.
enum class CacheFormat : uint8_t { dense, int8, e4m3 };

struct WriteSide {
  const void* from_TGD;
  int64_t token_stride;  // in elements, as all strides; the last axis is contiguous
  int64_t head_stride;
  void* cache_BGSD;
  float* scale_BGS;  // of codes
};

struct WriteKv {
  WriteSide k, v;
  const int64_t* slots_T;  // negative: skip
  int64_t G, S, D;
  Float dtype;
  CacheFormat format;
};

struct CopyBlocks {
  const uint8_t* src;
  uint8_t* dst;
  const int64_t* pairs;  // block of src, block of dst
  int64_t block_bytes;
};

struct PagedAttention {
  const void* q_THD;
  int64_t q_token_stride, q_head_stride;
  Float dtype;
  const void* k_cache_BGSD;
  const void* v_cache_BGSD;
  CacheFormat format;
  const float* k_scale_BGS;  // of codes
  const float* v_scale_BGS;
  const int32_t* block_tables;
  int64_t table_width;
  const int32_t* query_start;
  const int32_t* seq_lens;
  int64_t H, G, S, D;
  double scale;
  bool causal;
  int64_t window;        // 0: none
  double softcap;        // 0: none
  const float* sinks_H;  // or null
  void* out_THD;         // contiguous
};

// Keys are attended to in ranges of this many, counted from the sequence's start; what the ranges give is merged in their order.
constexpr int64_t kKeyRange = 1024;
// Most rows of an item, over its groups, where those of each are rounded up to a multiple of four.
constexpr int64_t kRowTile = 96;
constexpr int64_t kFewRows = 8;  // most rows of a group, for an item to have several groups

// Rows of one request and of groups that follow each other, and the ranges of keys that they attend to.
struct AttentionItem {
  int64_t request;
  int64_t group, groups;
  int64_t row, rows;                // of each group
  int64_t first_range, last_range;  // half open
  // Null: the item has all its rows' ranges, and writes their outputs. Otherwise their partial results, `state_floats` a range.
  float* states;
};

struct AttentionKernels {
  // Ranges of tokens, of pairs, of items. Scratch is aligned to 64 bytes, for one thread.
  void (*write_kv)(const WriteKv&, int64_t first, int64_t last);
  void (*copy_blocks)(const CopyBlocks&, int64_t first, int64_t last);
  int64_t (*scratch_floats)(const PagedAttention&);
  int64_t (*state_floats)(const PagedAttention&, int64_t rows);  // rows of all groups
  void (*attend)(const PagedAttention&, const AttentionItem* items, int64_t first, int64_t last, float* scratch);
  // Merges the states of items that cover all ranges of their rows, and writes the outputs.
  void (*combine)(const PagedAttention&, const AttentionItem* items, int64_t first, int64_t last, float* scratch);
};

}  // namespace q_cpu
