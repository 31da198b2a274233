"""The experts of a mixture-of-experts layer, fused in two stacked weights that are quantized."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from q_core import ops
from q_core.experts import ExpertFormat
from q_core.formats.four_bit import FourBit
from q_core.formats.fp8_rows import Fp8Rows
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor, resolve
from q_core.formats.sharding import local_shard
from q_core.formats.weight_format import WeightFormat
from q_nn.state_hooks import install

WEIGHTS = ("gate_up_proj", "down_proj")

# Shape suffixes: T tokens, E experts, N inner features of an expert, K features of a token, k experts a token.


class QuantizedExperts(nn.Module):
    """All experts of a layer: ``Σ_j w_j · down_j(silu(gate_j(x)) · up_j(x))`` over the experts that the router chose.

    It takes the place of the fused experts of transformers 5 (``MixtralExperts``, ``Qwen3MoeExperts`` and some fifty others), under the
    same parameter names and with the same forward; :func:`why_not` says of any module whether it is such a one.

    The weights are frozen; the gradient goes to the tokens and to the router's weights. One that isn't in whole blocks an expert, or that
    is held otherwise than the other one, has no product of its own: it is decoded in each forward, which costs the memory of a dense one.

    Args:
        gate_up_proj: the experts' gates, and below them their up projections, [E, 2N, K].
        down_proj: [E, K, N].

    Raises:
        TypeError: a weight isn't a :class:`QuantizedTensor` of :class:`FourBit`, :class:`Int8Rows` or :class:`Fp8Rows`.
        ValueError: the shapes don't fit each other.
    """

    def __init__(self, gate_up_proj: QuantizedTensor, down_proj: QuantizedTensor) -> None:
        super().__init__()
        for name, weight in zip(WEIGHTS, (gate_up_proj, down_proj), strict=True):
            if not isinstance(weight, QuantizedTensor) or not self.accepts_format(weight.format):
                raise TypeError(
                    f"QuantizedExperts: {name} is {weight!r}, expected a QuantizedTensor held as FourBit, Int8Rows or Fp8Rows"
                )
        if (wrong := _wrong_shapes(gate_up_proj, down_proj)) is not None:
            raise ValueError(f"QuantizedExperts: {wrong}")
        self.num_experts, self.hidden_dim, self.intermediate_dim = down_proj.shape
        self.gate_up_proj = nn.Parameter(gate_up_proj, requires_grad=False)
        self.down_proj = nn.Parameter(down_proj, requires_grad=False)
        install(self)

    @classmethod
    def from_experts(cls, experts: nn.Module, format: WeightFormat) -> Self:
        """Quantize fused experts.

        Raises:
            ValueError: they compute something else, see :func:`why_not`, or an element isn't finite.
        """
        if (reason := why_not(experts)) is not None:
            raise ValueError(f"QuantizedExperts.from_experts: {type(experts).__name__} can't be taken: {reason}")
        gate_up_proj, down_proj = (QuantizedTensor.quantize(experts.get_parameter(name), format) for name in WEIGHTS)
        return cls(gate_up_proj, down_proj).train(experts.training)

    def accepts_format(self, format: WeightFormat) -> bool:
        """Whether a checkpoint's weight in that format may be loaded."""
        return isinstance(format, (FourBit, Int8Rows, Fp8Rows))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send each token through its experts.

        Args:
            hidden_states: float32, bfloat16 or float16 [T, K].
            top_k_index: integers [T, k]; of an expert that isn't there (an id below 0, or of E and more) nothing is added.
            top_k_weights: floating [T, k].

        Returns:
            Tensor [T, K] of hidden_states' dtype.
        """
        gate_up_proj: Any = self.gate_up_proj
        down_proj: Any = self.down_proj
        E, K, N = self.num_experts, self.hidden_dim, self.intermediate_dim
        format, blocksize = _operand_format(gate_up_proj, down_proj, (2 * N * K, K * N))
        w13, w13_scale = _operand(gate_up_proj, E, format, hidden_states.dtype)
        w2, w2_scale = _operand(down_proj, E, format, hidden_states.dtype)
        result = ops.fused_moe(
            hidden_states,
            w13,
            w2,
            top_k_weights.float(),
            torch.where(top_k_index < E, top_k_index, -1).to(torch.int32),
            format=format,
            intermediate_size=N,
            w13_scale=w13_scale,
            w2_scale=w2_scale,
            blocksize=blocksize,
        )
        return result.to(hidden_states.dtype)  # under autocast it is of autocast's

    def extra_repr(self) -> str:
        """Sizes and format."""
        sizes = f"num_experts={self.num_experts}, hidden_dim={self.hidden_dim}, intermediate_dim={self.intermediate_dim}"
        weight = local_shard(self.gate_up_proj)
        assert weight is not None
        return f"{sizes}, format={weight.format}"


def why_not(experts: nn.Module) -> str | None:
    """Why a module can't be replaced by :class:`QuantizedExperts`; ``None`` if it can.

    A module can if transformers' ``use_experts_implementation`` declares it to be of gated experts without biases, its two weights have
    the shapes [E, 2N, K] and [E, K, N] and are its only tensors, and its gate computes ``silu(gate) * up``, which is tried out.
    """
    if isinstance(experts, QuantizedExperts):
        return "quantized already"
    if not hasattr(experts, "_apply_gate") or not hasattr(experts, "is_transposed"):
        return "what it computes isn't known, as transformers' use_experts_implementation doesn't declare it"
    said = [words for attribute, wanted, words in _DECLARED if getattr(experts, attribute, wanted) != wanted]
    if said:
        return f"its experts {', '.join(said)}, and fused_moe's don't"
    tensors = {name: tensor for named in (experts.named_parameters(), experts.named_buffers()) for name, tensor in named}
    if set(tensors) != set(WEIGHTS):
        return f"its tensors are {', '.join(sorted(tensors))}, expected {' and '.join(WEIGHTS)}"
    if (wrong := _wrong_shapes(*(tensors[name] for name in WEIGHTS))) is not None:
        return wrong
    return None if _gates_with_silu(experts) else "its activation isn't silu(gate) * up"


_DECLARED = (
    ("has_gate", True, "have no gate"),
    ("has_bias", False, "have biases"),
    ("has_post_expert_norm", False, "normalize what they give"),
    ("is_transposed", False, "hold their weights transposed"),
    ("is_concatenated", True, "interleave gate and up"),
)


def _wrong_shapes(gate_up_proj: Tensor, down_proj: Tensor) -> str | None:
    E, K, N = down_proj.shape if down_proj.ndim == 3 else (0, 0, 0)
    if down_proj.ndim == 3 and tuple(gate_up_proj.shape) == (E, 2 * N, K) and down_proj.numel():
        return None
    return f"gate_up_proj has shape {list(gate_up_proj.shape)} and down_proj {list(down_proj.shape)}, expected [E, 2N, K] and [E, K, N]"


@torch.no_grad()
def _gates_with_silu(experts: Any) -> bool:
    """Try the gate on numbers small and large, on the CPU: it has no tensors, so that it runs there wherever the weights are."""
    values = torch.tensor([-1e4, -30.0, -3.0, -0.5, 0.0, 0.7, 5.0, 30.0, 1e4], device="cpu")
    gate, up = (grid.reshape(1, -1) for grid in torch.meshgrid(values, values, indexing="ij"))
    result = experts._apply_gate(torch.cat((gate, up), -1))
    return torch.allclose(result.float(), nn.functional.silu(gate) * up)


def _operand_format(gate_up_proj: QuantizedTensor, down_proj: QuantizedTensor, sizes: tuple[int, int]) -> tuple[ExpertFormat, int]:
    """The name by which the op knows how both weights are held, and the blocksize; "dense" if it doesn't know such."""
    format = gate_up_proj.format
    if format.resolved_format != down_proj.format.resolved_format:
        return "dense", 0
    if not isinstance(format, FourBit):
        return "int8" if isinstance(format, Int8Rows) else "fp8", 0
    whole = not any(size % format.blocksize for size in sizes)
    return (format.quant_type, format.blocksize) if whole else ("dense", 0)


def _operand(weight: QuantizedTensor, experts: int, format: ExpertFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A weight and its scales as the op takes them."""
    if format == "dense":
        return weight.dequantize().to(dtype), None
    held = resolve(weight)
    if format in ("int8", "fp8"):
        return held["codes"], held["absmax"]
    # Whole blocks an expert: each is packed by itself.
    return held["packed"].view(experts, -1), held["absmax"].view(experts, -1)
