// Optimizer steps over lists of tensors, shared out as one loop: a group of many small tensors keeps all threads busy.

#include <algorithm>
#include <cmath>
#include <vector>

#include "module.h"
#include "optim.h"
#include "state.h"
#include "threads.h"

namespace q_cpu {

namespace {

AdamW adamw(const char* op, double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
  if (step < 1) bad_value({op, "step"}, "is " + std::to_string(step) + ", expected 1 or more");
  if (!(beta1 >= 0 && beta1 < 1)) bad_value({op, "beta1"}, "is " + std::to_string(beta1) + ", expected 0 <= beta1 < 1");
  if (!(beta2 >= 0 && beta2 < 1)) bad_value({op, "beta2"}, "is " + std::to_string(beta2) + ", expected 0 <= beta2 < 1");
  const double t = static_cast<double>(step);
  AdamW rule;
  rule.decay = static_cast<float>(1 - lr * weight_decay);
  rule.lr = static_cast<float>(lr);
  rule.beta1 = static_cast<float>(beta1);
  rule.one_minus_beta1 = static_cast<float>(1 - beta1);
  rule.beta2 = static_cast<float>(beta2);
  rule.one_minus_beta2 = static_cast<float>(1 - beta2);
  rule.eps = static_cast<float>(eps);
  rule.correction1 = static_cast<float>(1 / (1 - std::pow(beta1, t)));
  rule.sqrt_correction2 = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, t)));
  return rule;
}

// A list argument, with as many tensors as params has.
class TensorList {
 public:
  TensorList(const py::sequence& tensors, const char* op, const char* name, size_t expected)
      : tensors_(tensors), op_(op), name_(name) {
    if (tensors.size() != expected) {
      bad_value({op, name},
                "has " + std::to_string(tensors.size()) + " tensors, expected " + std::to_string(expected) + " as in params");
    }
  }

  TensorView operator[](size_t i) const { return TensorView(py::object(tensors_[i]), {op_, name_, static_cast<int64_t>(i)}); }

 private:
  const py::sequence& tensors_;
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

void adamw_8bit(const py::sequence& params, const py::sequence& grads, const py::sequence& state1, const py::sequence& state2,
                const py::sequence& absmax1, const py::sequence& absmax2, py::handle code1, py::handle code2, double lr,
                double beta1, double beta2, double eps, double weight_decay, int64_t step, int64_t blocksize) {
  constexpr const char* op = "optimizer_step_8bit";
  const AdamW rule = adamw(op, lr, beta1, beta2, eps, weight_decay, step);
  const auto book1 = code_book({op, "code1"}, code1);
  const auto book2 = code_book({op, "code2"}, code2);
  const size_t count = params.size();
  const TensorList all_params(params, op, "params", count), all_grads(grads, op, "grads", count);
  const TensorList all_state1(state1, op, "state1", count), all_state2(state2, op, "state2", count);
  const TensorList all_absmax1(absmax1, op, "absmax1", count), all_absmax2(absmax2, op, "absmax2", count);

  std::vector<AdamW8bit> tensors;
  std::vector<int64_t> starts{0};
  tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const TensorView param = all_params[i].floating();
    const int64_t numel = param.numel();
    const int64_t blocks = count_blocks(op, numel, blocksize);
    tensors.push_back({
        param.data<void>(),
        all_grads[i].of(param).sized(numel).data<const void>(),
        param.dtype(),
        numel,
        blocksize,
        all_state1[i].of(Scalar::u8).sized(numel).data<uint8_t>(),
        all_state2[i].of(Scalar::u8).sized(numel).data<uint8_t>(),
        all_absmax1[i].of(Scalar::f32).sized(blocks).data<float>(),
        all_absmax2[i].of(Scalar::f32).sized(blocks).data<float>(),
        book1.get(),
        book2.get(),
    });
    starts.push_back(starts.back() + blocks);
  }
  const auto kernel = kernels().optim->adamw_8bit;
  parallel_for_tensors(starts, blocksize, [&](size_t i, int64_t first, int64_t last) { kernel(tensors[i], rule, first, last); });
}

void adamw_32bit(const py::sequence& params, const py::sequence& grads, const py::sequence& state1, const py::sequence& state2,
                 double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
  constexpr const char* op = "optimizer_step_32bit";
  const AdamW rule = adamw(op, lr, beta1, beta2, eps, weight_decay, step);
  const size_t count = params.size();
  const TensorList all_params(params, op, "params", count), all_grads(grads, op, "grads", count);
  const TensorList all_state1(state1, op, "state1", count), all_state2(state2, op, "state2", count);

  std::vector<AdamW32bit> tensors;
  std::vector<int64_t> starts{0};
  tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const TensorView param = all_params[i].floating();
    const int64_t numel = param.numel();
    tensors.push_back({
        param.data<void>(),
        all_grads[i].of(param).sized(numel).data<const void>(),
        param.dtype(),
        numel,
        all_state1[i].of(Scalar::f32).sized(numel).data<float>(),
        all_state2[i].of(Scalar::f32).sized(numel).data<float>(),
    });
    starts.push_back(starts.back() + numel);
  }
  const auto kernel = kernels().optim->adamw_32bit;
  parallel_for_tensors(starts, 1, [&](size_t i, int64_t first, int64_t last) { kernel(tensors[i], rule, first, last); });
}

}  // namespace

void bind_optim(py::module_& m) {
  m.def("adamw_8bit", &adamw_8bit, py::arg("params"), py::arg("grads"), py::arg("state1"), py::arg("state2"), py::arg("absmax1"),
        py::arg("absmax2"), py::arg("code1"), py::arg("code2"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
        py::arg("weight_decay"), py::arg("step"), py::arg("blocksize"));
  m.def("adamw_32bit", &adamw_32bit, py::arg("params"), py::arg("grads"), py::arg("state1"), py::arg("state2"), py::arg("lr"),
        py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("step"));
}

}  // namespace q_cpu
