// Runs the baseline level's kernels on numbers of its own and prints a digest of each one's outputs, for machines and emulators that
// have no Python. What the kernels round is specified step by step, so the digests are the same on every architecture.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "attention.h"
#include "gemm.h"
#include "int8.h"
#include "moe.h"
#include "norm.h"
#include "optim.h"
#include "quantize.h"

namespace q_cpu::baseline {
extern const Kernels table;
}

namespace {

using namespace q_cpu;

uint64_t random_bits() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state >> 33;
}

std::vector<float> floats(int64_t count) {
  std::vector<float> out(static_cast<size_t>(count));
  for (float& value : out) value = static_cast<float>(static_cast<int64_t>(random_bits() % 2000001) - 1000000) / 250000.0f;
  return out;
}

std::vector<uint8_t> bytes(int64_t count) {
  std::vector<uint8_t> out(static_cast<size_t>(count));
  for (uint8_t& value : out) value = static_cast<uint8_t>(random_bits());
  return out;
}

// The same numbers in a dtype: bfloat16 and float16 by truncation.
std::vector<uint8_t> in(Float dtype, int64_t count) {
  std::vector<uint8_t> out;
  for (const float value : floats(count)) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (dtype == Float::bf16) bits >>= 16;
    if (dtype == Float::f16) {
      const uint32_t exponent = (bits >> 23) & 0xff;
      bits = (bits >> 16 & 0x8000) | (exponent < 113 ? 0 : (exponent - 112) << 10 | (bits >> 13 & 0x3ff));
    }
    for (int i = 0; i < (dtype == Float::f32 ? 4 : 2); ++i) out.push_back(static_cast<uint8_t>(bits >> 8 * i));
  }
  return out;
}

template <class T>
void print(const char* name, int variant, const std::vector<T>& output) {
  uint64_t digest = 14695981039346656037u;  // FNV-1a
  const auto* from = reinterpret_cast<const uint8_t*>(output.data());
  for (size_t i = 0; i < output.size() * sizeof(T); ++i) digest = (digest ^ from[i]) * 1099511628211u;
  std::printf("%s %d %016llx\n", name, variant, static_cast<unsigned long long>(digest));
}

// Evenly spaced codes, in their order.
FourBitBook even_book() {
  FourBitBook book{};
  book.scale = ScaleRule::absmax;
  for (int i = 0; i < 16; ++i) book.values[i] = static_cast<float>(i - 7) / 8.0f;
  for (int i = 0; i < 15; ++i) {
    book.midpoints[i] = (book.values[i] + book.values[i + 1]) / 2;
    book.steps[i] = 1;
  }
  book.zero_code = 7;
  build_four_bit_cells(&book);
  return book;
}

CodeBook cubic_book() {
  std::vector<float> entries;
  for (int i = -127; i <= 128; ++i) entries.push_back(static_cast<float>(i * i * i) / (128.0f * 128.0f * 128.0f));
  CodeBook book{};
  build_code_book(entries.data(), kBookSize, &book);
  return book;
}

void quantization(const QuantizeKernels& k, Float dtype, int variant) {
  constexpr int64_t n = 4133, blocks = (n + 63) / 64;
  const CodeBook book = cubic_book();
  const FourBitBook four_bit = even_book();
  const auto A = in(dtype, n);
  std::vector<uint8_t> codes(n), packed(n / 2 + 1), out(A.size());
  std::vector<float> absmax(blocks);
  k.quantize_blockwise({A.data(), dtype, n, 64, &book, codes.data(), absmax.data()}, 0, blocks);
  k.dequantize_blockwise({codes.data(), absmax.data(), &book.table, n, 64, out.data(), dtype}, 0, blocks);
  print("quantize_blockwise", variant, codes);
  print("dequantize_blockwise", variant, out);
  k.quantize_4bit({A.data(), dtype, n, 64, &four_bit, 0, packed.data(), absmax.data()}, 0, blocks);
  k.dequantize_4bit({packed.data(), absmax.data(), &four_bit, n, 64, out.data(), dtype}, 0, blocks);
  print("quantize_4bit", variant, packed);
  print("dequantize_4bit", variant, out);
  constexpr int64_t T = 4, K = n / T;
  std::vector<int8_t> q(T * K);
  std::vector<uint8_t> outliers(K);
  const QuantizeInt8Rowwise rows{A.data(), dtype, T, K, 3.5f, q.data(), absmax.data(), outliers.data()};
  k.find_outlier_columns(rows, 0, K);
  k.quantize_int8_rowwise(rows, 0, T);
  print("quantize_int8_rowwise", variant, q);
}

void products(const Kernels& all, Float dtype, int variant) {
  constexpr int64_t N = 37, K = 528;
  const FourBitBook book = even_book();
  const auto w = in(dtype, N * K), codes = bytes(N * K);
  const auto scales = floats(N * K / 16);
  const auto* w8 = reinterpret_cast<const int8_t*>(codes.data());
  for (const int64_t T : {1, 3, 21}) {
    const auto x = in(dtype, T * K);
    std::vector<uint8_t> out(static_cast<size_t>(T * N * (dtype == Float::f32 ? 4 : 2)));
    all.gemm->gemm({x.data(), w.data(), nullptr, T, N, K, out.data(), dtype, dtype}, 0, N);
    print("gemm", variant, out);
    all.gemm->gemm_4bit({x.data(), codes.data(), scales.data(), &book, 16, nullptr, T, N, K, out.data(), dtype, dtype}, 0, N);
    print("gemm_4bit", variant, out);
    all.int8->gemm_int8_weight({x.data(), w8, scales.data(), nullptr, T, N, K, out.data(), dtype, dtype}, 0, N);
    print("gemm_int8_weight", variant, out);
    const auto a = bytes(T * K);
    all.int8->int8_gemm({reinterpret_cast<const int8_t*>(a.data()), w8, scales.data(), scales.data(), nullptr, T, N, K, out.data(), dtype},
                        0, N);
    print("int8_gemm", variant, out);
  }
}

void elementwise(const Kernels& all, Float dtype, int variant) {
  constexpr int64_t rows = 5, K = 262, D = 2 * 65;
  const auto x = in(dtype, rows * K), weight = in(dtype, K);
  std::vector<uint8_t> out(x.size()), k_out(x.size());
  all.norm->rms_norm({x.data(), K, nullptr, 0, weight.data(), 1e-6f, rows, K, nullptr, out.data(), dtype}, 0, rows);
  print("rms_norm", variant, out);
  all.norm->silu_and_mul({x.data(), K, rows, K / 2, out.data(), dtype}, 0, rows);
  print("silu_and_mul", variant, out);
  const std::vector<int64_t> positions{0, 3, 1, 2, 3};
  const auto cos = floats(4 * 65), sin = floats(4 * 65);
  all.norm->rotary_embedding({{x.data(), K, D, 2, out.data()}, {x.data(), K, D, 1, k_out.data()}, positions.data(), cos.data(),
                              sin.data(), D, 65, false, dtype},
                             0, rows);
  print("rotary_embedding", variant, out);
  std::vector<float> weights(rows * 6);
  std::vector<int32_t> ids(rows * 6);
  all.moe->route_topk({x.data(), dtype, rows, K, 6, false, true, weights.data(), ids.data()}, 0, rows);
  print("route_topk", variant, ids);
  print("route_topk weights", variant, weights);
}

void optimizers(const OptimKernels& k, Float dtype, int variant) {
  constexpr int64_t n = 3001;
  auto param = in(dtype, n);
  const auto grad = in(dtype, n);
  auto first = floats(n), second = floats(n);
  for (float& value : second) value *= value;
  OptimizerTensor tensor{};
  tensor.param = param.data();
  tensor.grad = grad.data();
  tensor.dtype = dtype;
  tensor.numel = n;
  tensor.unit = kOptimizerRun;
  tensor.trust_ratio = 1;
  tensor.states[0] = first.data();
  tensor.states[1] = second.data();
  OptimizerSettings h{};
  h.rule = OptimizerRule::adamw;
  h.momentum = true;
  h.lr = h.lr_corrected = 0.01f;
  h.decay = 0.999f;
  h.beta1 = h.beta2 = 0.9f;
  h.one_minus_beta1 = h.one_minus_beta2 = 0.1f;
  h.eps = h.eps_corrected = 1e-8f;
  h.one_corrected = 1;
  k.step_32bit(tensor, h, 0, (n + kOptimizerRun - 1) / kOptimizerRun);
  print("optimizer_step_32bit", variant, param);
  print("optimizer_step_32bit state", variant, second);
}

void attention(const AttentionKernels& k, Float dtype, int variant) {
  constexpr int64_t H = 4, G = 2, S = 16, D = 80, blocks = 9, queries = 7;
  const auto q = in(dtype, queries * H * D), keys = in(dtype, blocks * G * S * D), values = in(dtype, blocks * G * S * D);
  const std::vector<int32_t> table{8, 1, 4, 2, 0, 6, 3, 5, 7}, start{0, queries}, lengths{139};
  std::vector<uint8_t> out(q.size());
  const PagedAttention a{q.data(),     H * D, D, dtype, keys.data(), values.data(), CacheFormat::dense, nullptr, nullptr, table.data(), blocks,
                         start.data(), lengths.data(), H, G, S, D, 0.11, true, 0, 0.0, nullptr, out.data()};
  std::vector<AttentionItem> items;
  for (int64_t group = 0; group < G; ++group) items.push_back({0, group, 1, 0, queries * H / G, 0, 1, nullptr});
  std::vector<float> scratch(static_cast<size_t>(k.scratch_floats(a)) + 16);
  auto* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
  k.attend(a, items.data(), 0, G, aligned);
  print("paged_attention", variant, out);
}

}  // namespace

int main() {
  const q_cpu::Kernels& all = q_cpu::baseline::table;
  for (int variant = 0; variant < 3; ++variant) {
    const auto dtype = static_cast<q_cpu::Float>(variant);
    quantization(*all.quantize, dtype, variant);
    products(all, dtype, variant);
    elementwise(all, dtype, variant);
    optimizers(*all.optim, dtype, variant);
    attention(*all.attention, dtype, variant);
  }
}
