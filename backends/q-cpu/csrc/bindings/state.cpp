#include "state.h"

#include <array>
#include <cstring>
#include <limits>
#include <map>

#include "levels.h"

namespace q_cpu {

namespace {

struct Levels {
  Level all[kMaxLevels];
  int count = find_levels(all);
  const Kernels* chosen = nullptr;

  Levels() {
    for (int i = 0; i < count; ++i) {
      if (all[i].supported) chosen = all[i].kernels;
    }
  }
};

Levels& levels() {
  static Levels instance;
  return instance;
}

std::string joined(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& word : words) out += (out.empty() ? "" : ", ") + word;
  return out;
}

std::map<std::string, FourBitBook>& four_bit_books() {
  static std::map<std::string, FourBitBook> books;
  return books;
}

struct CachedBook {
  std::vector<float> entries;
  std::shared_ptr<const CodeBook> book;
};

}  // namespace

const Kernels& kernels() { return *levels().chosen; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < levels().count; ++i) {
    if (levels().all[i].supported) names.emplace_back(levels().all[i].kernels->name);
  }
  return names;
}

void set_isa(const std::string& name) {
  std::vector<std::string> built;
  for (int i = 0; i < levels().count; ++i) {
    const Level& level = levels().all[i];
    built.emplace_back(level.kernels->name);
    if (name != level.kernels->name) continue;
    if (!level.supported) {
      throw py::value_error("ISA level " + name + " is not supported by this machine, which has " + joined(available_isas()));
    }
    levels().chosen = level.kernels;
    return;
  }
  throw py::value_error("ISA level '" + name + "' is unknown, expected one of " + joined(built));
}

void register_4bit(const std::string& quant_type, const std::vector<float>& values, const std::vector<int>& ordered,
                   const std::string& scale) {
  const Argument argument{"register_4bit", "ordered"};
  if (values.size() != 16) bad_value({"register_4bit", "values"}, "has " + std::to_string(values.size()) + " entries, expected 16");
  if (ordered.size() < 2 || ordered.size() > 16)
    bad_value(argument, "has " + std::to_string(ordered.size()) + " codes, expected 2 to 16");
  for (const int code : ordered) {
    if (code < 0 || code > 15) bad_value(argument, "has the code " + std::to_string(code) + ", expected 0 to 15");
  }
  static const std::map<std::string, ScaleRule> rules{
      {"absmax", ScaleRule::absmax}, {"e8m0", ScaleRule::e8m0}, {"e4m3", ScaleRule::e4m3}};
  const auto rule = rules.find(scale);
  if (rule == rules.end()) bad_value({"register_4bit", "scale"}, "is '" + scale + "', expected 'absmax', 'e8m0' or 'e4m3'");
  FourBitBook book;
  book.scale = rule->second;
  std::copy(values.begin(), values.end(), book.values);
  book.lowest_code = ordered[0];
  book.zero_code = ordered[0];
  for (size_t i = 0; i < 15; ++i) {
    const bool inside = i + 1 < ordered.size();
    book.midpoints[i] = inside ? (values[ordered[i]] + values[ordered[i + 1]]) / 2 : std::numeric_limits<float>::infinity();
    book.steps[i] = inside ? ordered[i + 1] - ordered[i] : 0;
    if (book.midpoints[i] < 0) book.zero_code += book.steps[i];
  }
  if (!build_four_bit_cells(&book)) bad_value(argument, "has two midpoints within 1/16, expected entries further apart");
  four_bit_books()[quant_type] = book;
}

const FourBitBook& four_bit_book(const char* op, const std::string& quant_type, const char* argument) {
  const auto found = four_bit_books().find(quant_type);
  if (found == four_bit_books().end()) {
    std::vector<std::string> names;
    for (const auto& entry : four_bit_books()) names.push_back(entry.first);
    bad_value({op, argument}, "is '" + quant_type + "', expected one of " + joined(names));
  }
  return found->second;
}

std::shared_ptr<const CodeBook> code_book(const Argument& argument, py::handle tensor) {
  static std::array<CachedBook, 4> recent;
  static size_t oldest = 0;

  const TensorView view = TensorView(tensor, argument).of(Scalar::f32);
  if (view.numel() < 2 || view.numel() > kBookSize) {
    bad_value(argument, "has " + std::to_string(view.numel()) + " entries, expected 2 to " + std::to_string(kBookSize));
  }
  const float* entries = view.data<const float>();
  const size_t size = static_cast<size_t>(view.numel());
  for (const CachedBook& cached : recent) {
    if (cached.entries.size() == size && std::memcmp(cached.entries.data(), entries, size * sizeof(float)) == 0) return cached.book;
  }
  for (size_t i = 0; i + 1 < size; ++i) {
    if (!(entries[i] <= entries[i + 1])) bad_value(argument, "is not ascending at entry " + std::to_string(i + 1) + "; sort it");
  }
  auto book = std::make_shared<CodeBook>();
  build_code_book(entries, static_cast<int>(size), book.get());
  recent[oldest] = {std::vector<float>(entries, entries + size), book};
  oldest = (oldest + 1) % recent.size();
  return recent[(oldest + recent.size() - 1) % recent.size()].book;
}

}  // namespace q_cpu
