// Optimizer steps over lists of tensors, shared out as one loop: a group of many small tensors keeps all threads busy.

#include "optim.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <vector>

#include "module.h"
#include "state.h"
#include "threads.h"

namespace q_cpu {

namespace {

constexpr const char* kRuleNames[] = {"adam", "adamw", "ademamix", "lion", "sgd", "rmsprop", "adagrad", "lamb", "lars"};

struct Arguments {
  const char* op;
  std::string name;
  double lr, beta1, beta2, beta3, alpha, eps, weight_decay, dampening;
  bool nesterov;
  double trust_coefficient;
  int64_t step;
};

OptimizerRule rule_of(const char* op, const std::string& name) {
  std::string names;
  for (size_t i = 0; i < std::size(kRuleNames); ++i) {
    if (name == kRuleNames[i]) return static_cast<OptimizerRule>(i);
    names += (i ? ", " : "") + std::string(kRuleNames[i]);
  }
  bad_value({op, "name"}, "is '" + name + "', expected one of " + names);
}

void check_share(const char* op, const char* argument, double value) {
  if (!(value >= 0 && value < 1)) bad_value({op, argument}, "is " + std::to_string(value) + ", expected 0 or more and less than 1");
}

OptimizerSettings settings_of(const Arguments& a) {
  if (a.step < 1) bad_value({a.op, "step"}, "is " + std::to_string(a.step) + ", expected 1 or more");
  check_share(a.op, "beta1", a.beta1);
  check_share(a.op, "beta2", a.beta2);
  check_share(a.op, "beta3", a.beta3);
  check_share(a.op, "dampening", a.dampening);
  const double t = static_cast<double>(a.step);
  const double share1 = 1 - std::pow(a.beta1, t), sqrt_share2 = std::sqrt(1 - std::pow(a.beta2, t));
  // A root of zero and this are still next to nothing, but zero over it is zero.
  const auto positive = [](double eps) { return std::max(static_cast<float>(eps), std::numeric_limits<float>::min()); };
  OptimizerSettings h;
  h.rule = rule_of(a.op, a.name);
  h.momentum = a.beta1 != 0;
  h.first_step = a.step == 1;
  h.nesterov = a.nesterov;
  h.lr = static_cast<float>(a.lr);
  h.decay = static_cast<float>(1 - a.lr * a.weight_decay);
  h.weight_decay = static_cast<float>(a.weight_decay);
  h.beta1 = static_cast<float>(a.beta1);
  h.one_minus_beta1 = static_cast<float>(1 - a.beta1);
  h.beta2 = static_cast<float>(a.beta2);
  h.one_minus_beta2 = static_cast<float>(1 - a.beta2);
  h.beta3 = static_cast<float>(a.beta3);
  h.one_minus_beta3 = static_cast<float>(1 - a.beta3);
  h.eps = positive(a.eps);
  h.one_corrected = static_cast<float>(sqrt_share2 / share1);
  h.lr_corrected = static_cast<float>(a.lr * sqrt_share2 / share1);
  h.alpha_corrected = static_cast<float>(a.lr * a.alpha * sqrt_share2);
  h.eps_corrected = positive(a.eps * sqrt_share2);
  h.one_minus_dampening = static_cast<float>(1 - a.dampening);
  return h;
}

bool keeps_state(const OptimizerSettings& h, int state) {
  switch (h.rule) {
    case OptimizerRule::lion:
      return state == 0;
    case OptimizerRule::sgd:
    case OptimizerRule::lars:
      return state == 0 && h.momentum;
    case OptimizerRule::rmsprop:
      return state == 1 || (state == 0 && h.momentum);
    case OptimizerRule::adagrad:
      return state == 1;
    case OptimizerRule::ademamix:
      return true;
    default:
      return state != 2;
  }
}

// A list argument, with as many tensors as it should have. It holds them: a sequence may make its items as they are asked for, and
// a list may change while the kernels run without the GIL.
class TensorList {
 public:
  TensorList(const py::sequence& tensors, const char* op, const char* name, size_t expected)
      : tensors_(tensors), op_(op), name_(name) {
    if (tensors_.size() != expected) {
      bad_value({op, name}, "has " + std::to_string(tensors_.size()) + " tensors, expected " +
                                (expected ? std::to_string(expected) + " as in params" : "none: the rule keeps no such state"));
    }
  }

  TensorView operator[](size_t i) const { return TensorView(tensors_[i], {op_, name_, static_cast<int64_t>(i)}); }

  const py::tuple& held() const { return tensors_; }

 private:
  py::tuple tensors_;
  const char* op_;
  const char* name_;
};

// Runs step(tensor, first, last) over the units of all tensors, numbered through; starts[i] is the first of tensor i.
template <class Step>
void parallel_for_tensors(const std::vector<int64_t>& starts, int64_t elements_per_unit, Step&& step) {
  parallel_for(starts.back(), elements_per_unit, [&](int64_t first, int64_t last) {
    size_t tensor = static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), first) - starts.begin()) - 1;
    for (; first < last; ++tensor) {
      const int64_t end = std::min(last, starts[tensor + 1]);
      if (end > first) step(tensor, first - starts[tensor], end - starts[tensor]);
      first = std::max(first, end);
    }
  });
}

using StateLists = std::array<const py::sequence*, kMaxStates>;
using Kernel = int64_t (*)(const OptimizerTensor&, const OptimizerSettings&, int64_t, int64_t);
using NormsKernel = OptimizerNorms (*)(const OptimizerTensor&, const OptimizerSettings&, int64_t, int64_t);

constexpr const char* kStateNames[kMaxStates] = {"state1", "state2", "state3"};
constexpr const char* kAbsmaxNames[kMaxStates] = {"absmax1", "absmax2", "absmax3"};

// The tensors of a step, and their units numbered through.
struct Tensors {
  std::vector<OptimizerTensor> all;
  std::vector<int64_t> starts{0};
  std::vector<bool> kept;         // as they are: no step touches them
  std::vector<int64_t*> skipped;  // where elements left as they were are counted, if they are
  std::vector<py::tuple> held;

  int64_t units(size_t i) const { return starts[i + 1] - starts[i]; }
};

// Parameters, gradients and counters; their states are filled in by the caller.
Tensors parameters_of(const char* op, const py::sequence& params, const py::sequence& grads, const py::sequence& skipped,
                      int64_t unit) {
  Tensors tensors;
  const size_t count = params.size();
  const TensorList all_params(params, op, "params", count), all_grads(grads, op, "grads", count);
  tensors.held = {all_params.held(), all_grads.held()};
  tensors.all.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const TensorView param = all_params[i].floating();
    OptimizerTensor tensor{};
    tensor.param = param.data<void>();
    tensor.grad = all_grads[i].of(param).sized(param.numel()).data<const void>();
    tensor.dtype = param.dtype();
    tensor.numel = param.numel();
    tensor.unit = unit;
    tensor.trust_ratio = 1;
    tensors.all.push_back(tensor);
    tensors.starts.push_back(tensors.starts.back() + (param.numel() + unit - 1) / unit);
  }
  tensors.kept.resize(count);
  const TensorList counters(skipped, op, "skipped", skipped.size() ? count : 0);
  tensors.held.push_back(counters.held());
  for (size_t i = 0; i < counters.held().size(); ++i)
    tensors.skipped.push_back(counters[i].of(Scalar::i64).sized(1).data<int64_t>());
  return tensors;
}

// Lists of states that the rule keeps are as long as params; the others are empty.
size_t expected_length(const OptimizerSettings& h, int state, const Tensors& tensors) {
  return keeps_state(h, state) ? tensors.all.size() : 0;
}

float trust_ratio(const Arguments& a, const OptimizerSettings& h, const OptimizerNorms& norms) {
  const double params = std::sqrt(norms.params), updates = std::sqrt(norms.updates);
  const bool is_lamb = h.rule == OptimizerRule::lamb;
  if (!is_lamb && !(updates > 0)) return 1;
  const double numerator = is_lamb ? params : a.trust_coefficient * params;
  const double denominator = is_lamb ? updates : updates + a.weight_decay * params + a.eps;
  return numerator > 0 && denominator > 0 ? static_cast<float>(numerator / denominator) : 1;
}

// Fills in the trust ratios of lamb and lars, and which tensors are kept as they are for a non-finite gradient. Norms are summed in
// shares whose size depends on the tensor alone, and then in order, so that the number of threads doesn't show.
void find_trust_ratios(const Arguments& a, const OptimizerSettings& h, NormsKernel kernel, Tensors& tensors) {
  constexpr int64_t kShares = 256;
  std::vector<OptimizerNorms> shares;
  for (size_t i = 0; i < tensors.all.size(); ++i) {
    const OptimizerTensor& tensor = tensors.all[i];
    const int64_t units_per_share = std::max<int64_t>(1, (tensors.units(i) + kShares - 1) / kShares);
    shares.resize(static_cast<size_t>((tensors.units(i) + units_per_share - 1) / units_per_share));
    parallel_for(static_cast<int64_t>(shares.size()), units_per_share * tensor.unit, [&](int64_t first, int64_t last) {
      for (int64_t share = first; share < last; ++share) {
        const int64_t begin = share * units_per_share;
        shares[static_cast<size_t>(share)] = kernel(tensor, h, begin, std::min(begin + units_per_share, tensors.units(i)));
      }
    });
    OptimizerNorms sum{0, 0, true};
    for (const OptimizerNorms& share : shares) {
      sum.params += share.params;
      sum.updates += share.updates;
      sum.finite &= share.finite;
    }
    tensors.all[i].trust_ratio = trust_ratio(a, h, sum);
    tensors.kept[i] = !sum.finite;
  }
}

void run_step(const Arguments& a, const OptimizerSettings& h, Kernel kernel, NormsKernel norms, Tensors& tensors) {
  if (h.rule == OptimizerRule::lamb || h.rule == OptimizerRule::lars) find_trust_ratios(a, h, norms, tensors);
  const int64_t unit = tensors.all.empty() ? 1 : tensors.all[0].unit;
  const auto count = [&](size_t i, int64_t elements) {
    if (elements && !tensors.skipped.empty()) __atomic_fetch_add(tensors.skipped[i], elements, __ATOMIC_RELAXED);
  };
  parallel_for_tensors(tensors.starts, unit, [&](size_t i, int64_t first, int64_t last) {
    if (!tensors.kept[i]) count(i, kernel(tensors.all[i], h, first, last));
  });
  for (size_t i = 0; i < tensors.kept.size(); ++i) {
    if (tensors.kept[i]) count(i, tensors.all[i].numel);
  }
}

void optimizer_step_8bit(const std::string& name, const py::sequence& params, const py::sequence& grads, const py::sequence& state1,
                         const py::sequence& state2, const py::sequence& state3, const py::sequence& absmax1,
                         const py::sequence& absmax2, const py::sequence& absmax3, const py::sequence& skipped, py::handle code1,
                         py::handle code2, double lr, double beta1, double beta2, double beta3, double alpha, double eps,
                         double weight_decay, double dampening, bool nesterov, double trust_coefficient, int64_t step,
                         int64_t blocksize) {
  constexpr const char* op = "optimizer_step_8bit";
  const Arguments a{op, name, lr, beta1, beta2, beta3, alpha, eps, weight_decay, dampening, nesterov, trust_coefficient, step};
  const OptimizerSettings h = settings_of(a);
  const auto first_moments = code_book({op, "code1"}, code1);
  const auto second_moments = code_book({op, "code2"}, code2);
  const CodeBook* books[kMaxStates] = {first_moments.get(), second_moments.get(), first_moments.get()};
  count_blocks(op, 0, blocksize);
  Tensors tensors = parameters_of(op, params, grads, skipped, blocksize);
  const StateLists states{&state1, &state2, &state3}, scales{&absmax1, &absmax2, &absmax3};
  for (int state = 0; state < kMaxStates; ++state) {
    const size_t length = expected_length(h, state, tensors);
    const TensorList codes(*states[state], op, kStateNames[state], length), absmax(*scales[state], op, kAbsmaxNames[state], length);
    tensors.held.insert(tensors.held.end(), {codes.held(), absmax.held()});
    for (size_t i = 0; i < length; ++i) {
      OptimizerTensor& tensor = tensors.all[i];
      tensor.codes[state] = codes[i].of(Scalar::u8).sized(tensor.numel).data<uint8_t>();
      tensor.absmax[state] = absmax[i].of(Scalar::f32).sized(tensors.units(i)).data<float>();
      tensor.books[state] = books[state];
    }
  }
  run_step(a, h, kernels().optim->step_8bit, kernels().optim->norms_8bit, tensors);
}

void optimizer_step_32bit(const std::string& name, const py::sequence& params, const py::sequence& grads,
                          const py::sequence& state1, const py::sequence& state2, const py::sequence& state3,
                          const py::sequence& skipped, double lr, double beta1, double beta2, double beta3, double alpha,
                          double eps, double weight_decay, double dampening, bool nesterov, double trust_coefficient,
                          int64_t step) {
  constexpr const char* op = "optimizer_step_32bit";
  const Arguments a{op, name, lr, beta1, beta2, beta3, alpha, eps, weight_decay, dampening, nesterov, trust_coefficient, step};
  const OptimizerSettings h = settings_of(a);
  Tensors tensors = parameters_of(op, params, grads, skipped, kOptimizerRun);
  const StateLists states{&state1, &state2, &state3};
  for (int state = 0; state < kMaxStates; ++state) {
    const size_t length = expected_length(h, state, tensors);
    const TensorList list(*states[state], op, kStateNames[state], length);
    tensors.held.push_back(list.held());
    for (size_t i = 0; i < length; ++i) {
      tensors.all[i].states[state] = list[i].of(Scalar::f32).sized(tensors.all[i].numel).data<float>();
    }
  }
  run_step(a, h, kernels().optim->step_32bit, kernels().optim->norms_32bit, tensors);
}

}  // namespace

void bind_optim(py::module_& m) {
  m.def("optimizer_step_8bit", &optimizer_step_8bit, py::arg("name"), py::arg("params"), py::arg("grads"), py::arg("state1"),
        py::arg("state2"), py::arg("state3"), py::arg("absmax1"), py::arg("absmax2"), py::arg("absmax3"), py::arg("skipped"),
        py::arg("code1"), py::arg("code2"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("beta3"), py::arg("alpha"),
        py::arg("eps"), py::arg("weight_decay"), py::arg("dampening"), py::arg("nesterov"), py::arg("trust_coefficient"),
        py::arg("step"), py::arg("blocksize"));
  m.def("optimizer_step_32bit", &optimizer_step_32bit, py::arg("name"), py::arg("params"), py::arg("grads"), py::arg("state1"),
        py::arg("state2"), py::arg("state3"), py::arg("skipped"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
        py::arg("beta3"), py::arg("alpha"), py::arg("eps"), py::arg("weight_decay"), py::arg("dampening"), py::arg("nesterov"),
        py::arg("trust_coefficient"), py::arg("step"));
}

}  // namespace q_cpu
