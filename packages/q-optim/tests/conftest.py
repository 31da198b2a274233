"""What the tests share: every algorithm at every precision, parameters of awkward shapes, and training on made-up gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from q_optim import LAMB, LARS, SGD, Adagrad, Adam, AdamW, AdEMAMix, Lion, Muon, RMSprop
from q_optim.optimizer import BlockwiseOptimizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors are faster so, and the machine is shared."""
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class Variant:
    """An algorithm at one precision, with settings that use all that it has; called as its class is."""

    algorithm: type[BlockwiseOptimizer]
    bits: int
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, params: Any, **settings: Any) -> BlockwiseOptimizer:
        return self.algorithm(params, **{"optim_bits": self.bits, **self.settings, **settings})

    @property
    def whole(self) -> bool:
        """Whether a tensor is updated as one, so that one non-finite gradient leaves all of it."""
        return self.algorithm in (LAMB, LARS, Muon)


_ALGORITHMS: dict[str, tuple[type[BlockwiseOptimizer], dict[str, Any]]] = {
    "adam": (Adam, {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "adamw": (AdamW, {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "ademamix": (AdEMAMix, {"lr": 1e-2, "betas": (0.8, 0.95, 0.99), "t_alpha": 10, "t_beta3": 10, "weight_decay": 0.1}),
    "lion": (Lion, {"lr": 1e-3, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "lamb": (LAMB, {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "lars": (LARS, {"lr": 1e-1, "momentum": 0.9, "weight_decay": 0.1}),
    "rmsprop": (RMSprop, {"lr": 1e-3, "alpha": 0.95, "weight_decay": 0.1}),
    "rmsprop-momentum": (RMSprop, {"lr": 1e-3, "alpha": 0.95, "momentum": 0.9, "weight_decay": 0.1}),
    "adagrad": (Adagrad, {"lr": 1e-2, "lr_decay": 0.1, "initial_accumulator_value": 0.5, "weight_decay": 0.1}),
    "sgd": (SGD, {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd-momentum": (SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "sgd-nesterov": (SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "muon": (Muon, {"lr": 1e-2, "weight_decay": 0.1}),
}

_VARIANTS = [
    pytest.param(Variant(algorithm, bits, settings), id=f"{name}-{bits}bit")
    for name, (algorithm, settings) in _ALGORITHMS.items()
    for bits in sorted(algorithm.supported_bits, reverse=True)
]


@pytest.fixture(params=_VARIANTS)
def variant(request: pytest.FixtureRequest) -> Variant:
    """Each algorithm at each of its precisions."""
    found: Variant = request.param
    return found


@pytest.fixture(params=[each for each in _VARIANTS if each.values[0].bits < 32 and each.values[0].algorithm is not Muon])
def coded_rule(request: pytest.FixtureRequest) -> Variant:
    """Each rule of the op surface with its states in codes."""
    found: Variant = request.param
    return found


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype that a parameter may have."""
    found: torch.dtype = request.param
    return found


@pytest.fixture
def make_params() -> Callable[..., list[nn.Parameter]]:
    """Parameters that are large enough for codes, with a partial block; too small for them; of no dimension; and not contiguous."""

    def make(dtype: torch.dtype = torch.float32, *, matrices: bool = False, seed: int = 0) -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(seed)
        shapes = ((70, 100), (8, 9), (64, 80)) if matrices else ((70, 100), (64,), (), (8, 4, 16, 16))
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        tensors[-1] = tensors[-1].T.contiguous().T if matrices else tensors[-1].to(memory_format=torch.channels_last)
        return [nn.Parameter(tensor.to(dtype)) for tensor in tensors]

    return make


@pytest.fixture
def train() -> Callable[..., None]:
    """Takes the steps of these numbers with gradients that depend on the number alone."""

    def run(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            optimizer.step()

    return run


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Compares parameters and, if given, what their optimizers hold of them: bit for bit."""

    def compare(
        ours: Sequence[Tensor],
        theirs: Sequence[Tensor],
        optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer] | None = None,
    ) -> None:
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), f"parameter {i}"
            if optimizers is not None:
                left, right = optimizers[0].state[a], optimizers[1].state[b]
                assert left.keys() == right.keys()
                for key, value in left.items():
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[key])), f"{key} of parameter {i}"

    return compare
