"""Any sequence of what can be done with adapters, against the definition."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn

from q_nn import (
    LoRAConfig,
    QConfig,
    QuantizedTensor,
    add_lora,
    disable_lora,
    enable_lora,
    lora_adapters,
    merge_lora,
    quantize,
    remove_lora,
    set_lora,
    unmerge_lora,
)
from q_nn.lora import TrainedModule

NAMES = st.sampled_from(["a", "b", "c"])


class Adapters(RuleBasedStateMachine):
    """Two layers; each adapter's matrices are known, and whether it may do what is asked."""

    @initialize(quantized=st.booleans())
    def start(self, quantized: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 3))
        self.quantized = quantized
        if quantized:
            quantize(self.model, QConfig("nf4", skip=("2",)))
        weights = [layer.weight for layer in self.model]
        self.weights = [w.dequantize() if isinstance(w, QuantizedTensor) else w.detach().clone() for w in weights]
        self.biases = [layer.bias.detach().clone() for layer in self.model]
        self.state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.x = torch.randn(5, 8)
        self.known: dict[str, dict[int, tuple[Tensor, Tensor | None]]] = {}
        self.active: list[str] = []
        self.enabled, self.merged = True, False

    def attempt(self, allowed: bool, call: Any) -> None:
        """What isn't allowed raises; that it then changes nothing is for the invariants to see."""
        if allowed:
            call()
        else:
            with pytest.raises(ValueError, match=r"_lora: "):
                call()

    @rule(name=NAMES, where=st.sampled_from([("0",), ("1",), ("0", "1")]), dora=st.booleans(), saved=st.booleans())
    def add(self, name: str, where: tuple[str, ...], dora: bool, saved: bool) -> None:
        allowed = name not in self.known and not self.merged
        config = LoRAConfig(rank=2, target=where, dora=dora, modules_to_save=("2",) if saved else ())
        self.attempt(allowed, lambda: add_lora(self.model, config, name=name))
        if not allowed:
            return
        self.known[name], self.active, self.enabled = {}, [name], True
        for index in map(int, where):
            adapter = self.model[index].adapters[name]
            nn.init.normal_(adapter.lora_B.weight)
            lengths = None
            if dora:
                nn.init.uniform_(adapter.lora_magnitude_vector, 1, 2)
                lengths = adapter.lora_magnitude_vector.detach().clone()
            self.known[name][index] = ((adapter.lora_B.weight @ adapter.lora_A.weight).detach() * adapter.scaling, lengths)
        if saved:
            copied = self.model[2].adapters[name].weight
            nn.init.normal_(copied)
            self.known[name][2] = (copied.detach().clone(), None)

    @rule(names=st.lists(NAMES, max_size=2))
    def choose(self, names: list[str]) -> None:
        names = list(dict.fromkeys(names))
        allowed = bool(names) and not self.merged and all(name in self.known for name in names)
        if allowed and len(names) > 1:
            dora = any(lengths is not None for name in names for _, lengths in self.known[name].values())
            allowed = not dora and sum(2 in self.known[name] for name in names) < 2
        self.attempt(allowed, lambda: set_lora(self.model, names))
        if allowed:
            self.active = names

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        allowed = name in self.known and not self.merged
        self.attempt(allowed, lambda: remove_lora(self.model, name))
        if allowed:
            del self.known[name]
            self.active = [each for each in self.active if each != name]
            self.enabled = self.enabled or not self.known

    @rule()
    def disable(self) -> None:
        self.attempt(bool(self.known), lambda: disable_lora(self.model))
        self.enabled = self.enabled and not self.known

    @rule()
    def enable(self) -> None:
        self.attempt(bool(self.known), lambda: enable_lora(self.model))
        self.enabled = True

    @rule(dense=st.booleans())
    def merge(self, dense: bool) -> None:
        dense = dense or self.quantized  # else it is rounded
        allowed = bool(self.active) and self.enabled and not self.merged
        self.attempt(allowed, lambda: merge_lora(self.model, dense=dense, reversible=True))
        self.merged = self.merged or allowed

    @rule()
    def unmerge(self) -> None:
        self.attempt(self.merged, lambda: unmerge_lora(self.model))
        self.merged = False

    @invariant()
    def output_is_by_the_definition(self) -> None:
        x = self.x
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            for name in self.active if self.enabled else []:
                if index not in self.known[name]:
                    continue
                matrix, lengths = self.known[name][index]
                weight = matrix if index == 2 else weight + matrix
                if lengths is not None:
                    weight = weight / weight.norm(dim=1, keepdim=True) * lengths[:, None]
            x = x @ weight.T + bias
        with torch.no_grad():
            torch.testing.assert_close(self.model.eval()(self.x), x, rtol=1e-4, atol=1e-4)

    @invariant()
    def the_base_is_as_it_was(self) -> None:
        assert list(lora_adapters(self.model)) == [name for name in lora_adapters(self.model) if name in self.known]
        assert lora_adapters(self.model).keys() == self.known.keys()
        assert self.known or not any(isinstance(module, TrainedModule) for module in self.model.modules())
        state = self.model.state_dict()
        base = {name.replace("base_layer.", ""): tensor for name, tensor in state.items() if ".adapters." not in name}
        assert base.keys() == self.state.keys()
        assert all(torch.equal(tensor, self.state[name]) for name, tensor in base.items())


Adapters.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestAdapters = Adapters.TestCase
