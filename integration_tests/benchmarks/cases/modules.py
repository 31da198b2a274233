"""q_nn's modules beside bitsandbytes' and torch's: forward as for inference, and forward with backward as for fine-tuning.

All weights are frozen; the gradients are those of the input, and of adapters where there are any.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

import q_nn
from benchmarks.case import Call, Case, Target
from benchmarks.cases.gemm import FOUR_BIT_TARGETS
from benchmarks.inputs import normal, sets_for

SIDE = 4096
TOKENS = (1, 4, 16, 64, 512, 2048)
RANK = 16
SECONDS = 0.2
"""A contender's turns at a shape: there are many shapes."""

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
"""It says at every product of bfloat16 with int8 that it casts to float16."""

BITSANDBYTES, TORCH = "bitsandbytes", "torch bf16"
RATIO_TARGETS = {tokens: replace(target, fraction=None) for tokens, target in FOUR_BIT_TARGETS.items()}
INT8_TARGETS = {
    tokens: Target(ratio=ratio, peers=(BITSANDBYTES,)) for tokens, ratio in {1: 1.5, 4: 5.0, 16: 2.0, 64: 1.0, 512: 1.0}.items()
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A module of ours, and what it is held against.

    Attributes:
        name: for people.
        ours: makes it of a dense layer.
        theirs: makes what bitsandbytes has in its place, if it has anything.
        bytes: of its weight.
        targets: what is asked of the forward, by tokens.
        rank: of the adapters that the others get beside their layers; ours has its own.
        outliers: columns of the input that are 60 times as large as the others.
    """

    name: str
    ours: Callable[[nn.Linear], nn.Module]
    theirs: Callable[[nn.Linear], nn.Module] | None
    bytes: int
    targets: dict[int, Target]
    rank: int = 0
    outliers: int = 0


def cases() -> Iterator[Case]:
    for kind in KINDS:
        contenders = _contenders(kind, training=False)
        for tokens in TOKENS:
            yield _case(kind, contenders, tokens, "forward", _forward)
        contenders = _contenders(kind, training=True)
        for tokens in TOKENS:
            yield _case(kind, contenders, tokens, "forward and backward", _forward_and_backward)


def _case(
    kind: Kind, contenders: dict[str, list[nn.Module]], tokens: int, what: str, call: Callable[[list[nn.Module], Tensor], Call]
) -> Case:
    x = _input(tokens, kind.outliers)
    calls = {name: call(layers, x) for name, layers in contenders.items()}
    return Case(
        f"{kind.name}, {what}", f"{tokens} × {SIDE}²", "bfloat16", calls.pop("ours"), calls,
        sets=len(contenders["ours"]), target=kind.targets.get(tokens, Target()) if what == "forward" else Target(), seconds=SECONDS,
    )  # fmt: skip


# Cases are asked for, and called, in inference mode, whose tensors no backward may meet.


@torch.inference_mode(False)
def _contenders(kind: Kind, *, training: bool) -> dict[str, list[nn.Module]]:
    """The layers of each contender: as many as don't fit into the cache together, all of the same values, as no time depends on these."""
    dense = nn.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    makers = {"ours": kind.ours, BITSANDBYTES: kind.theirs, TORCH: copy.deepcopy}
    made = {name: make(dense).train(training) for name, make in makers.items() if make is not None}
    if kind.rank:
        made = {name: layer if name == "ours" else Adapted(layer, kind.rank) for name, layer in made.items()}
    return {name: _used_copies(layer, sets_for(kind.bytes)) for name, layer in made.items()}


def _used_copies(layer: nn.Module, count: int) -> list[nn.Module]:
    """Copies that have been called: the first call of one may pack or decode what later calls find."""
    x = _input(1, 0)
    with torch.no_grad():
        layer(x)
        copies = [copy.deepcopy(layer) for _ in range(count)]
        for each in copies:
            each(x)
    return copies


@torch.inference_mode(False)
def _input(tokens: int, outliers: int) -> Tensor:
    x = normal(tokens, SIDE, dtype=torch.bfloat16)
    x[:, :outliers] *= 60
    return x


def _forward(layers: list[nn.Module], x: Tensor) -> Call:
    return lambda i: layers[i](x)


@torch.inference_mode(False)
def _forward_and_backward(layers: list[nn.Module], x: Tensor) -> Call:
    x = x.detach().requires_grad_()
    dy = torch.ones_like(x)

    @torch.inference_mode(False)
    def call(i: int) -> tuple[Tensor, ...]:
        trained = [parameter for parameter in layers[i].parameters() if parameter.requires_grad]
        return torch.autograd.grad(layers[i](x), [x, *trained], dy)

    return call


class Adapted(nn.Module):
    """LoRA over a layer as PEFT computes it: float32 adapters beside the frozen layer."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(SIDE, rank, bias=False)
        self.lora_B = nn.Linear(rank, SIDE, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + self.lora_B(self.lora_A(x.float())).to(y.dtype)


def _adapted(linear: nn.Linear) -> nn.Module:
    model = nn.Sequential(q_nn.LinearNF4.from_linear(linear))
    q_nn.add_lora(model, q_nn.LoRAConfig(rank=RANK, alpha=RANK, target=("0",)))
    return model[0]


def _linear4bit(quant_type: str, double_quant: bool) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear4bit(
            SIDE, SIDE, bias=False, compute_dtype=torch.bfloat16, compress_statistics=double_quant, quant_type=quant_type
        )
        layer.weight = bnb.nn.Params4bit(
            linear.weight.clone(), requires_grad=False, quant_type=quant_type, compress_statistics=double_quant, blocksize=64
        )
        made: nn.Module = layer.to("cpu")
        return made

    return make


def _linear8bit(threshold: float) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear8bitLt(SIDE, SIDE, bias=False, has_fp16_weights=False, threshold=threshold)
        layer.weight = bnb.nn.Int8Params(linear.weight.clone(), requires_grad=False, has_fp16_weights=False)
        made: nn.Module = layer.to("cpu")
        return made

    return make


FOUR_BIT_BYTES, INT8_BYTES = SIDE * SIDE // 2, SIDE * SIDE
KINDS = (
    Kind("LinearNF4, double-quantized", q_nn.LinearNF4.from_linear, _linear4bit("nf4", True), FOUR_BIT_BYTES, RATIO_TARGETS),
    Kind("LinearFP4", lambda linear: q_nn.LinearFP4.from_linear(linear, double_quant=False), _linear4bit("fp4", False), FOUR_BIT_BYTES,
         RATIO_TARGETS),
    Kind("Linear8bitLt", q_nn.Linear8bitLt.from_linear, _linear8bit(0.0), INT8_BYTES, INT8_TARGETS),
    Kind("Linear8bitLt, threshold 6", lambda linear: q_nn.Linear8bitLt.from_linear(linear, threshold=6.0), _linear8bit(6.0), INT8_BYTES,
         {}, outliers=4),
    Kind("LinearInt8", q_nn.LinearInt8.from_linear, None, INT8_BYTES, {}),
    Kind("LoRALinear over LinearNF4", _adapted, _linear4bit("nf4", True), FOUR_BIT_BYTES, {}, rank=RANK),
)  # fmt: skip
