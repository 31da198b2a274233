#include "attention.h"

#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "module.h"
#include "state.h"
#include "threads.h"

namespace q_cpu {

namespace {

std::string text(int64_t value) { return std::to_string(value); }

// Uninitialized memory that starts on a cache line.
class Floats {
 public:
  explicit Floats(int64_t count) : memory_(new (kLine) float[static_cast<size_t>(count)]) {}
  float* get() const { return memory_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Release {
    void operator()(float* memory) const { ::operator delete[](memory, kLine); }
  };
  std::unique_ptr<float[], Release> memory_;
};

// A cache [B, G, S, D] and its scales. Float8 comes as bytes: DLPack has had no code for it from the start.
struct Cache {
  void* data;
  CacheFormat format;
  float* scale;
};

Cache cache_of(const char* op, const char* name, const char* scale_name, py::handle cache, py::handle scale,
               const TensorView& activations, int64_t slots, int64_t D) {
  const TensorView view = TensorView(cache, {op, name}).sized(checked_product(op, slots, D));
  Cache result{view.data<void>(), CacheFormat::dense, nullptr};
  if (view.scalar() == Scalar::i8) {
    result.format = CacheFormat::int8;
  } else if (view.scalar() == Scalar::u8) {
    result.format = CacheFormat::e4m3;
  } else {
    view.of(activations);
  }
  if (scale.is_none() != (result.format == CacheFormat::dense)) {
    bad_value({op, scale_name}, scale.is_none() ? "is None, expected the scales of the codes" : "is given, expected None");
  }
  if (!scale.is_none()) result.scale = TensorView(scale, {op, scale_name}).of(Scalar::f32).sized(slots).data<float>();
  return result;
}

void write_kv(py::handle k, py::handle v, py::handle k_cache, py::handle v_cache, py::handle slot_mapping, py::handle k_scale,
              py::handle v_scale, int64_t T, int64_t B, int64_t G, int64_t S, int64_t D) {
  constexpr const char* op = "write_kv";
  const TensorView keys = TensorView(k, {op, "k_TGD"}, Layout::strided).floating().shaped({T, G, D});
  const TensorView values = TensorView(v, {op, "v_TGD"}, Layout::strided).of(keys).shaped({T, G, D});
  const int64_t slots = checked_product(op, checked_product(op, B, G), S);
  const Cache k_side = cache_of(op, "k_cache_BGSD", "k_scale_BGS", k_cache, k_scale, keys, slots, D);
  const Cache v_side = cache_of(op, "v_cache_BGSD", "v_scale_BGS", v_cache, v_scale, keys, slots, D);
  if (k_side.format != v_side.format) bad_type({op, "v_cache_BGSD"}, "has another dtype than k_cache_BGSD, expected the same");
  const int64_t block_slots = checked_product(op, B, S);
  const int64_t* targets = TensorView(slot_mapping, {op, "slot_mapping"}).of(Scalar::i64).sized(T).data<const int64_t>();
  for (int64_t t = 0; t < T; ++t) {
    if (targets[t] >= block_slots) {
      bad_value({op, "slot_mapping", t}, "is " + text(targets[t]) + ", expected less than " + text(block_slots));
    }
  }
  const WriteKv args{
      {keys.data<const void>(), keys.stride(0), keys.stride(1), k_side.data, k_side.scale},
      {values.data<const void>(), values.stride(0), values.stride(1), v_side.data, v_side.scale},
      targets,
      G,
      S,
      D,
      keys.dtype(),
      k_side.format,
  };
  if (keys.numel() == 0) return;
  const auto kernel = kernels().attention->write_kv;
  parallel_for(T, 2 * G * D, [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

// Whether a block is written that another pair reads, so that the order of the pairs would matter.
bool reads_what_it_writes(const CopyBlocks& args, int64_t pairs, int64_t src_blocks, int64_t dst_blocks) {
  const uint8_t* src_end = args.src + src_blocks * args.block_bytes;
  const uint8_t* dst_end = args.dst + dst_blocks * args.block_bytes;
  if (src_end <= args.dst || dst_end <= args.src) return false;
  if (args.src != args.dst) return true;  // they overlap in part
  std::vector<bool> written(static_cast<size_t>(dst_blocks));
  for (int64_t i = 0; i < pairs; ++i) written[static_cast<size_t>(args.pairs[2 * i + 1])] = true;
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t from = args.pairs[2 * i];
    if (from < dst_blocks && written[static_cast<size_t>(from)]) return true;
  }
  return false;
}

void copy_blocks(py::handle src, py::handle dst, py::handle pairs, int64_t count, int64_t src_blocks, int64_t dst_blocks,
                 int64_t block_bytes) {
  constexpr const char* op = "copy_kv_blocks";
  CopyBlocks args{
      TensorView(src, {op, "src"}).of(Scalar::u8).sized(checked_product(op, src_blocks, block_bytes)).data<const uint8_t>(),
      TensorView(dst, {op, "dst"}).of(Scalar::u8).sized(checked_product(op, dst_blocks, block_bytes)).data<uint8_t>(),
      TensorView(pairs, {op, "pairs"}).of(Scalar::i64).sized(checked_product(op, count, 2)).data<const int64_t>(),
      block_bytes,
  };
  for (int64_t i = 0; i < 2 * count; ++i) {
    const int64_t blocks = i % 2 == 0 ? src_blocks : dst_blocks;
    if (args.pairs[i] < 0 || args.pairs[i] >= blocks) {
      bad_value({op, "pairs", i / 2}, "names block " + text(args.pairs[i]) + ", expected 0 to " + text(blocks - 1));
    }
  }
  if (block_bytes == 0) return;
  // Then the sources are set aside first, in the pairs' order.
  std::unique_ptr<uint8_t[]> aside;
  std::vector<int64_t> renumbered;
  if (reads_what_it_writes(args, count, src_blocks, dst_blocks)) {
    aside.reset(new uint8_t[static_cast<size_t>(count * block_bytes)]);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(aside.get() + i * block_bytes, args.src + args.pairs[2 * i] * block_bytes, static_cast<size_t>(block_bytes));
      renumbered.insert(renumbered.end(), {i, args.pairs[2 * i + 1]});
    }
    args.src = aside.get();
    args.pairs = renumbered.data();
  }
  const auto kernel = kernels().attention->copy_blocks;
  parallel_for(count, block_bytes / 4, [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

// How a call is cut. A request whose rows are one tile, such as one that decodes, is cut along its keys, an item a range; then its
// states are combined. Otherwise an item is a tile of rows with all their keys; so it is too when there are states enough, and with
// them items for any number of threads. Few rows are taken for several groups together, whose keys follow each other in memory.
constexpr int64_t kMostStates = 1 << 20;  // floats

struct Plan {
  std::vector<AttentionItem> items;
  std::vector<AttentionItem> combined;
  int64_t products = 0;  // of rows and keys
  int64_t states = 0;    // floats
};

// Items enough to keep threads busy; beyond, they are rather large.
constexpr int64_t kItems = 64;

// Most groups of an item of few rows.
int64_t most_groups(int64_t rows) { return rows > kFewRows ? 1 : kRowTile / ((rows + 3) / 4 * 4); }

// Groups of an item of few rows, where single groups would make `items`.
int64_t groups_of_item(const PagedAttention& a, int64_t rows, int64_t items) {
  const int64_t most = std::clamp<int64_t>(items / kItems, 1, std::min(a.G, most_groups(rows)));
  const int64_t chunks = (a.G + most - 1) / most;
  return (a.G + chunks - 1) / chunks;
}

void add_rows(const PagedAttention& a, int64_t request, int64_t row, int64_t rows, bool whole, int64_t ranges, Plan* plan) {
  const int64_t seq_len = a.seq_lens[request], ratio = a.H / a.G;
  const int64_t first_seen = seq_len - (a.query_start[request + 1] - a.query_start[request]);
  const int64_t begin = a.window == 0 ? 0 : std::max<int64_t>(0, first_seen + row / ratio + 1 - a.window);
  const int64_t end = a.causal ? first_seen + (row + rows - 1) / ratio + 1 : seq_len;
  const int64_t first = begin / kKeyRange, last = (end + kKeyRange - 1) / kKeyRange;
  plan->products += a.G * rows * (end - begin);
  const bool split = whole && last - first > 1 && plan->states < kMostStates;
  const int64_t most = groups_of_item(a, rows, ranges * a.G);
  for (int64_t range = first; split && range < last; ++range) {
    for (int64_t group = 0; group < a.G; group += most) {
      plan->items.push_back({request, group, std::min(most, a.G - group), row, rows, range, range + 1, nullptr});
    }
  }
  for (int64_t group = 0; group < a.G; group += most) {
    const int64_t groups = std::min(most, a.G - group);
    (split ? plan->combined : plan->items).push_back({request, group, groups, row, rows, first, last, nullptr});
    // States are counted for now, and become pointers when all are known.
    if (split) plan->states += (last - first) * kernels().attention->state_floats(a, groups * rows);
  }
}

Plan plan_items(const PagedAttention& a, int64_t R) {
  Plan plan;
  const int64_t ratio = a.H / a.G;
  int64_t ranges = 0;
  for (int64_t request = 0; request < R; ++request) ranges += (a.seq_lens[request] + kKeyRange - 1) / kKeyRange;
  for (int64_t request = 0; request < R; ++request) {
    const int64_t rows = ratio * (a.query_start[request + 1] - a.query_start[request]);
    // Later rows have more keys; they come first, so that the threads end at about one time.
    for (int64_t row = (rows - 1) / kRowTile * kRowTile; rows > 0 && row >= 0; row -= kRowTile) {
      add_rows(a, request, row, std::min(kRowTile, rows - row), rows <= kRowTile, ranges, &plan);
    }
  }
  return plan;
}

// How many of the items from `first` on are of one request.
size_t chunks_of_request(const std::vector<AttentionItem>& items, size_t first) {
  size_t last = first;
  while (last < items.size() && items[last].request == items[first].request) ++last;
  return last - first;
}

// Gives the items that are combined their memory: a chunk of groups' ranges one after the other.
void place_states(const PagedAttention& a, float* memory, Plan* plan) {
  size_t item = 0;
  for (size_t i = 0; i < plan->combined.size();) {
    const size_t chunks = chunks_of_request(plan->combined, i);
    const AttentionItem& one = plan->combined[i];
    const int64_t ranges = one.last_range - one.first_range;
    std::vector<int64_t> sizes;
    for (size_t chunk = 0; chunk < chunks; ++chunk) {
      AttentionItem& combined = plan->combined[i + chunk];
      sizes.push_back(kernels().attention->state_floats(a, combined.groups * combined.rows));
      combined.states = memory;
      memory += ranges * sizes.back();
    }
    while (plan->items[item].request != one.request) ++item;
    for (int64_t range = 0; range < ranges; ++range) {
      for (size_t chunk = 0; chunk < chunks; ++chunk)
        plan->items[item++].states = plan->combined[i + chunk].states + range * sizes[chunk];
    }
    i += chunks;
  }
}

void check_requests(const char* op, const PagedAttention& a, int64_t T, int64_t R, int64_t B, int64_t max_query_len,
                    int64_t max_seq_len) {
  for (int64_t r = 0; r <= R; ++r) {
    const int64_t start = a.query_start[r], expected = r == 0 ? 0 : a.query_start[r - 1];
    if (r == 0 ? start != 0 : start < expected) {
      bad_value({op, "query_start", r}, "is " + text(start) + ", expected " + text(expected) + (r == 0 ? "" : " or more"));
    }
  }
  if (a.query_start[R] != T) bad_value({op, "query_start", R}, "is " + text(a.query_start[R]) + ", expected T = " + text(T));
  for (int64_t r = 0; r < R; ++r) {
    const int64_t queries = a.query_start[r + 1] - a.query_start[r], length = a.seq_lens[r];
    if (queries == 0) continue;
    if (queries > max_query_len) {
      bad_value({op, "query_start", r + 1}, "gives a request " + text(queries) + " queries, expected at most max_query_len");
    }
    if (length < queries || length > max_seq_len) {
      bad_value({op, "seq_lens", r},
                "is " + text(length) + ", expected " + text(queries) + " (its queries) to " + text(max_seq_len));
    }
    const int64_t begin = a.window == 0 ? 0 : std::max<int64_t>(0, length - queries + 1 - a.window);
    for (int64_t block = begin / a.S; block < (length + a.S - 1) / a.S; ++block) {
      const int32_t number = a.block_tables[r * a.table_width + block];
      if (number < 0 || number >= B) {
        bad_value({op, "block_tables", r}, "names block " + text(number) + ", expected 0 to " + text(B - 1));
      }
    }
  }
}

void paged_attention(py::handle q, py::handle k_cache, py::handle v_cache, py::handle block_tables, py::handle query_start,
                     py::handle seq_lens, int64_t max_query_len, int64_t max_seq_len, double scale, bool causal, int64_t window,
                     double softcap, py::handle sinks, py::handle k_scale, py::handle v_scale, int64_t T, int64_t H, int64_t R,
                     int64_t M, int64_t B, int64_t G, int64_t S, int64_t D, py::handle out) {
  constexpr const char* op = "paged_attention";
  if (G < 1 || H % G != 0) bad_value({op, "q_THD"}, "has " + text(H) + " heads, expected a multiple of " + text(G));
  if (window < 0 || (window > 0 && !causal)) bad_value({op, "window"}, "is " + text(window) + ", expected 1 or more, with causal");
  const int64_t most = checked_product(op, M, S);
  if (max_seq_len > most) bad_value({op, "max_seq_len"}, "is " + text(max_seq_len) + ", expected at most M * S = " + text(most));
  const TensorView queries = TensorView(q, {op, "q_THD"}, Layout::strided).floating().shaped({T, H, D});
  const int64_t slots = checked_product(op, checked_product(op, B, G), S);
  const Cache keys = cache_of(op, "k_cache_BGSD", "k_scale_BGS", k_cache, k_scale, queries, slots, D);
  const Cache values = cache_of(op, "v_cache_BGSD", "v_scale_BGS", v_cache, v_scale, queries, slots, D);
  if (keys.format != values.format) bad_type({op, "v_cache_BGSD"}, "has another dtype than k_cache_BGSD, expected the same");
  const TensorView lengths = TensorView(seq_lens, {op, "seq_lens"}).of(Scalar::i32).sized(R);
  const PagedAttention args{
      queries.data<const void>(),
      queries.stride(0),
      queries.stride(1),
      queries.dtype(),
      keys.data,
      values.data,
      keys.format,
      keys.scale,
      values.scale,
      TensorView(block_tables, {op, "block_tables"}).of(Scalar::i32).sized(checked_product(op, R, M)).data<const int32_t>(),
      M,
      TensorView(query_start, {op, "query_start"}).of(Scalar::i32).sized(R + 1).data<const int32_t>(),
      lengths.data<const int32_t>(),
      H,
      G,
      S,
      D,
      scale,
      causal,
      window,
      softcap,
      sinks.is_none() ? nullptr : TensorView(sinks, {op, "sinks_H"}).of(Scalar::f32).sized(H).data<const float>(),
      TensorView(out, {op, "out"}).of(queries).sized(queries.numel()).data<void>(),
  };
  if (queries.numel() == 0) return;
  check_requests(op, args, T, R, B, max_query_len, max_seq_len);

  Plan plan = plan_items(args, R);
  const Floats states(plan.states);
  place_states(args, states.get(), &plan);
  const AttentionKernels& family = *kernels().attention;
  const auto on_items = [&](const std::vector<AttentionItem>& items, int64_t cost, auto kernel) {
    parallel_for(static_cast<int64_t>(items.size()), cost, [&](int64_t first, int64_t last) {
      const Floats scratch(family.scratch_floats(args));
      kernel(args, items.data(), first, last, scratch.get());
    });
  };
  on_items(plan.items, plan.products * D / static_cast<int64_t>(plan.items.size()), family.attend);
  on_items(plan.combined, plan.states, family.combine);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("write_kv", &write_kv, py::arg("k_TGD"), py::arg("v_TGD"), py::arg("k_cache_BGSD"), py::arg("v_cache_BGSD"),
        py::arg("slot_mapping"), py::arg("k_scale_BGS"), py::arg("v_scale_BGS"), py::arg("T"), py::arg("B"), py::arg("G"),
        py::arg("S"), py::arg("D"));
  m.def("copy_kv_blocks", &copy_blocks, py::arg("src"), py::arg("dst"), py::arg("pairs"), py::arg("count"), py::arg("src_blocks"),
        py::arg("dst_blocks"), py::arg("block_bytes"));
  m.def("paged_attention", &paged_attention, py::arg("q_THD"), py::arg("k_cache_BGSD"), py::arg("v_cache_BGSD"),
        py::arg("block_tables"), py::arg("query_start"), py::arg("seq_lens"), py::arg("max_query_len"), py::arg("max_seq_len"),
        py::arg("scale"), py::arg("causal"), py::arg("window"), py::arg("softcap"), py::arg("sinks_H"), py::arg("k_scale_BGS"),
        py::arg("v_scale_BGS"), py::arg("T"), py::arg("H"), py::arg("R"), py::arg("M"), py::arg("B"), py::arg("G"), py::arg("S"),
        py::arg("D"), py::arg("out"));
}

}  // namespace q_cpu
