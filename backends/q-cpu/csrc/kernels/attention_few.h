// Attention of few rows to the keys of several kv heads, such as those of a request that decodes.
//
// A call's time is that of reading the cache once, if computing keeps out of its way. So nothing is packed: keys are multiplied
// where they lie, by queries that are arranged for it, while the next kv head's, or the next tile's, are fetched. The kv heads
// follow each other in the cache and take turns at every tile, so that memory is read in its order.
//
// Rows come in *sets* of kSetRows. A vector of a set has a *quad*, four lanes, of each row: four lanes of queries, or four keys'
// scores.

#pragma once

#include "attention_keys.h"
#include "attention_packed.h"
#include "quads.h"

namespace q_cpu::Q_CPU_LEVEL {
namespace {

constexpr int64_t kSetRows = kLanes / 4;
constexpr int64_t kQuads = kKeyTile / 4;

// Running softmax of a set, each row's in its quad.
struct SetSums {
  Vector largest, sum;
};

// The rows of the tile that comes after the current one, in the order in which they are asked for: keys and values in turns,
// because two streams are read faster than one.
struct RowsAhead {
  const void* row[2 * kKeyTile];

  explicit RowsAhead(const TileRows& next) {
    for (int64_t i = 0; i < kKeyTile; ++i) {
      row[2 * i] = next.key[i];
      row[2 * i + 1] = next.value[i];
    }
    // Page addresses first: looking them up takes longer than what follows.
    for (int64_t i = 0; i < 2 * kKeyTile; i += 8) {
      __builtin_prefetch(row[i]);
      __builtin_prefetch(row[i + 1]);
    }
  }
};

// Asks for a row's cache lines.
inline void fetch(const void* row, int64_t bytes) {
  for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(static_cast<const char*>(row) + offset);
}

// Products of sets' queries [sets, blocks, kLanes] with a few keys, a quad of keys a vector. Not part of its caller, so that the
// keys' addresses stay in registers. Meanwhile the `soon` and `ahead` rows are asked for, as many as there are keys.
template <class Tile, int kSets, int kKeys>
__attribute__((noinline)) void multiply_some_keys(const float* queries, int64_t blocks, const float* const* keys,
                                                  const void* const* soon, const void* const* ahead, int64_t row_bytes,
                                                  Vector* products) {
  const float* key[kKeys];
  for (int i = 0; i < kKeys; ++i) key[i] = keys[i];
  Vector sums[kSets][kKeys] = {};
  int64_t block = 0;
  for (int64_t part = 0; part < kKeys; ++part) {
    fetch(ahead[part], row_bytes);
    fetch(soon[part], row_bytes);
    for (const int64_t end = (part + 1) * blocks / kKeys; block < end; ++block) {
      Vector query[kSets];
      for (int set = 0; set < kSets; ++set) query[set] = load_vector(queries + (set * blocks + block) * kLanes);
      for (int i = 0; i < kKeys; ++i) {
        const Vector lanes = repeat_quad(key[i] + 4 * block);
        for (int set = 0; set < kSets; ++set) sums[set][i] = Tile::multiply(query[set], lanes, sums[set][i]);
      }
    }
  }
  for (int set = 0; set < kSets; ++set) {
    for (int i = 0; i < kKeys; i += 4) {
      Vector four[4] = {sums[set][i], sums[set][i + 1], sums[set][i + 2], sums[set][i + 3]};
      transpose_quads(four);
      products[set * kQuads + i / 4] = four[0] + four[1] + four[2] + four[3];
    }
  }
}

template <class Tile, class Q, class C>
struct FewRows {
  const PagedAttention& a;
  const Scratch& scratch;
  const AttentionItem& item;
  const Reach reach{a, item};
  const ScoreScale score_scale{a};
  const int64_t columns = columns_of(a);
  const int64_t blocks = (a.D + 4 * Tile::kDepth - 1) / (4 * Tile::kDepth);  // quads of a query
  const int64_t sets = (item.rows + kSetRows - 1) / kSetRows;
  const int64_t row_bytes = a.D * static_cast<int64_t>(sizeof(C));
  // Whether keys are whole quads of lanes as they lie.
  const bool in_place = Tile::template kReadsInPlace<C> && a.D % (4 * Tile::kDepth) == 0;
  static constexpr int64_t kSetWeights = kQuads * kLanes / Tile::kDepth;

  float* set_queries(int64_t group, int64_t set) const { return scratch.queries + (group * sets + set) * blocks * kLanes; }

  void load_queries() const {
    memset(scratch.queries, 0, static_cast<size_t>(item.groups * sets * blocks * kLanes) * sizeof(float));
    for (int64_t r = 0; r < item.groups * item.rows; ++r) {
      const auto [token, head] = Query(a, item, r);
      const Q* q = static_cast<const Q*>(a.q_THD) + token * a.q_token_stride + head * a.q_head_stride;
      const int64_t row = r % item.rows;
      float* out = set_queries(r / item.rows, row / kSetRows) + row % kSetRows * 4;
      for (int64_t k = 0; k < 4 * blocks; k += kLanes) {
        const Vector lanes = read_some_lanes<Tile>(q + k * Tile::kDepth, a.D - k * Tile::kDepth);
        for (int64_t quad = 0; quad < smaller(kLanes / 4, blocks - k / 4); ++quad) {
          memcpy(out + (k / 4 + quad) * kLanes, reinterpret_cast<const float*>(&lanes) + 4 * quad, 4 * sizeof(float));
        }
      }
    }
  }

  // Keys as lanes: where they lie, or decoded.
  void find_keys(const TileRows& rows, const float** keys) const {
    for (int64_t key = 0; key < kKeyTile; ++key) {
      keys[key] = in_place ? static_cast<const float*>(rows.key[key]) : scratch.keys + key * columns;
      for (int64_t d = 0; !in_place && d < a.D; d += kLanes * Tile::kDepth) {
        const Vector lanes = read_some_lanes<Tile>(static_cast<const C*>(rows.key[key]) + d, a.D - d);
        write(lanes, scratch.keys + key * columns + d / Tile::kDepth);
      }
    }
  }

  // Products of sets' queries with all keys, a quad of keys a vector. The first half of the rows ahead is fetched meanwhile.
  template <int kSets>
  void multiply_queries(const float* queries, const TileRows& rows, const float* const* keys, const RowsAhead& ahead,
                        Vector (*products)[kQuads]) const {
    constexpr int kKeys = kSets == 1 ? 8 : 4;  // at a time: as many sums as hide each other's latency
    for (int64_t key = 0; key < kKeyTile; key += kKeys) {
      // What was asked for a tile ago is asked for again: some requests are dropped where many are under way.
      const void* const* soon = key + kKeys < kKeyTile ? rows.key + key + kKeys : rows.value;
      multiply_some_keys<Tile, kSets, kKeys>(queries, blocks, keys + key, soon, ahead.row + key, row_bytes, products[0] + key / 4);
    }
  }

  void mask_set(int64_t tile, int64_t row, Vector* scores) const {
    Vector begin, end;
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t of = smaller(row + i / 4, item.row + item.rows - 1);
      begin[i] = static_cast<float>(reach.begin(of) - tile);
      end[i] = static_cast<float>(reach.end(of) - tile);
    }
    const float within[4] = {0, 1, 2, 3};
    for (int64_t quad = 0; quad < kQuads; ++quad) {
      scores[quad] = mask_scores(scores[quad], repeat_quad(within) + static_cast<float>(4 * quad), begin, end);
    }
  }

  // Turns a set's scores into weights relative to the new largest scores. Returns what its sums and outputs keep.
  Vector update_set(Vector* scores, SetSums* sums) const {
    Vector largest = scores[0];
    for (int64_t quad = 1; quad < kQuads; ++quad) largest = larger(scores[quad], largest);
    largest = larger(swap_in_quads<2>(largest), largest);
    largest = larger(swap_in_quads<1>(largest), largest);
    largest = larger(largest, sums->largest);
    const Vector shift = shift_of(largest);
    for (int64_t quad = 0; quad < kQuads; ++quad) scores[quad] = exp2_lanes(scores[quad] - shift);
    const Vector keep = exp2_lanes(sums->largest - shift);
    *sums = {largest, sums->sum * keep + sum_quads(scores)};
    return keep;
  }

  // Sums of each row's weights, in the order of sum_lanes of their vectors' sum.
  static Vector sum_quads(const Vector* weights) {
    Vector sums[kSetRows];
    for (int64_t i = 0; i < kSetRows; ++i) {
      sums[i] = weights[i];
      for (int64_t quad = i + kSetRows; quad < kQuads; quad += kSetRows) sums[i] += weights[quad];
    }
    for (int64_t width = kSetRows / 2; width > 0; width /= 2) {
      for (int64_t i = 0; i < width; ++i) sums[i] += sums[i + width];
    }
    const Vector halves = sums[0] + swap_in_quads<2>(sums[0]);
    return halves + swap_in_quads<1>(halves);
  }

  // Weights of a set's keys, as lanes for the second product; brings its sums and outputs to the new largest scores.
  void weigh_set(int64_t tile, int64_t set, const Scales& scales, Vector* scores, SetSums* sums, float* outputs,
                 float* weights) const {
    const int64_t row = set * kSetRows, rows = smaller(kSetRows, item.rows - row);
    for (int64_t quad = 0; quad < kQuads; ++quad) scores[quad] = score_scale(scores[quad], repeat_quad(scales.key + 4 * quad));
    const int64_t first = item.row + row;
    if (reach.begin(first + rows - 1) > tile || reach.end(first) < tile + kKeyTile) mask_set(tile, first, scores);
    const Vector before = sums->largest, keep = update_set(scores, sums);
    for (int64_t r = 0; r < rows; ++r) {
      if (before[4 * r] != sums->largest[4 * r]) scale_row(outputs + (row + r) * columns, columns, keep[4 * r]);
    }
    for (int64_t quad = 0; score_scale.coded && quad < kQuads; ++quad) scores[quad] *= repeat_quad(scales.value + 4 * quad);
    for (int64_t quad = 0; quad < kQuads; quad += kTileVectors)
      Tile::store_weights(scores + quad, weights + quad * kLanes / Tile::kDepth);
  }

  // outputs += weights · values, of some of an item's rows. The second half of the rows ahead is fetched meanwhile.
  void add_values(int64_t row, int64_t rows, const float* weights, const TileRows& values, const RowsAhead& ahead,
                  float* outputs) const {
    const float* row_weights = weights + row / kSetRows * kSetWeights;
    float* row_outputs = outputs + row * columns;
    with_rows(rows, [&](auto count) {
      constexpr int kRows = decltype(count)::value;
      constexpr int kVectors = kPanelVectors<kRows>;
      int64_t column = 0;
      for (; column + kVectors * kLanes <= columns; column += kVectors * kLanes) {
        add_columns<kRows, kVectors>(column, row_weights, values, ahead, row_outputs + column);
      }
      for (; column < columns; column += 2 * kLanes) {
        add_columns<kRows, 2>(column, row_weights, values, ahead, row_outputs + column);
      }
    });
  }

  template <int kRows, int kVectors>
  void add_columns(int64_t column, const float* weights, const TileRows& rows, const RowsAhead& ahead, float* outputs) const {
    constexpr int64_t kQuadKeys = 4 / Tile::kDepth;  // lanes
    Vector sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] = load_vector(outputs + r * columns + v * kLanes);
    for (int64_t k = 0; k < kKeyTile / Tile::kDepth; ++k) {
      Vector values[kVectors];
      for (int v = 0; v < kVectors; v += Tile::kDepth) {
        Tile::template read_columns<C>(rows.value + k * Tile::kDepth, column + v * kLanes, a.D, values + v);
      }
      // A share of the rows ahead, and of the values that come soon.
      const int64_t done = column * kKeyTile + k * Tile::kDepth * kVectors * kLanes;
      for (int64_t row = done / columns; row < (done + kVectors * kLanes * Tile::kDepth) / columns; ++row) {
        fetch(ahead.row[kKeyTile + row], row_bytes);
        fetch(rows.value[smaller(row + 4, kKeyTile - 1)], row_bytes);
      }
      const float* quad = weights + k / kQuadKeys * kSetRows * kQuadKeys + k % kQuadKeys;
      for (int r = 0; r < kRows; ++r) {
        const float weight = quad[r / kSetRows * kSetWeights + r % kSetRows * kQuadKeys];
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Tile::multiply(weight, values[v], sums[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) write(sums[r][v], outputs + r * columns + v * kLanes);
  }

  void attend_tile(int64_t tile, int64_t group, const Scales& scales, const TileRows& rows, const RowsAhead& ahead, SetSums* sums,
                   float* outputs) const {
    constexpr int64_t kMostSets = kFewRows / kSetRows;
    const float* keys[kKeyTile];
    Vector scores[kMostSets][kQuads];
    alignas(64) float weights[kMostSets * kSetWeights];
    find_keys(rows, keys);
    int64_t set = 0;
    for (; set + 2 <= sets; set += 2) multiply_queries<2>(set_queries(group, set), rows, keys, ahead, scores + set);
    if (set < sets) multiply_queries<1>(set_queries(group, set), rows, keys, ahead, scores + set);
    for (set = 0; set < sets; ++set) weigh_set(tile, set, scales, scores[set], sums + set, outputs, weights + set * kSetWeights);
    for (int64_t r = 0; r < item.rows; r += kPanelRows) {
      add_values(r, smaller(kPanelRows, item.rows - r), weights, rows, ahead, outputs);
    }
  }

  void attend_range(int64_t range, const States& states) const {
    states.clear(a, item.groups * item.rows);
    SetSums sums[kRowTile / kSetRows];
    for (int64_t i = 0; i < item.groups * sets; ++i) sums[i] = {Vector{} - __builtin_inff(), Vector{}};
    TileRows rows[2];
    int turn = 0;
    bool found = false;
    for_each_tile(a, item, reach, range, [&](int64_t tile, const TileSlots& slots, const TileSlots& next) {
      if (!found) find_rows<C>(a, slots, 0, scratch.zeros, &rows[turn]);
      found = true;
      for (int64_t group = 0; group < item.groups; ++group, turn ^= 1) {
        const bool last = group + 1 == item.groups;
        TileRows& following = rows[turn ^ 1];
        find_rows<C>(a, last ? next : slots, last ? 0 : group + 1, scratch.zeros, &following);
        Scales scales;
        read_scales(a, slots, group, &scales);
        float* outputs = states.outputs + group * item.rows * columns;
        attend_tile(tile, group, scales, rows[turn], RowsAhead(following), sums + group * sets, outputs);
      }
    });
    for (int64_t r = 0; r < item.groups * item.rows; ++r) {
      const SetSums& set = sums[r / item.rows * sets + r % item.rows / kSetRows];
      const int64_t lane = r % item.rows % kSetRows * 4;
      states.sums[r] = {set.largest[lane], set.sum[lane]};
    }
  }
};

}  // namespace
}  // namespace q_cpu::Q_CPU_LEVEL
