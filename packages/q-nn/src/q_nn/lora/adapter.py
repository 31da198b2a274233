"""One adapter of one linear layer: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353).

N out features, K in features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from q_core.formats.quantized_tensor import QuantizedTensor, resolve
from q_core.formats.sharding import is_dtensor
from q_nn.lora.config import LoRAConfig


class Adapter(nn.Module):
    """Two small matrices and, with DoRA, the length of each row of the weight that they make together with the base's.

    Its state dict has the keys of PEFT's files: ``lora_A.weight`` [R, K], ``lora_B.weight`` [N, R], ``lora_magnitude_vector`` [N].

    Args:
        base: the layer that it is for.
        config: everything but rank and alpha, which patterns may say otherwise for this layer.
        rank, alpha: of this adapter.
    """

    def __init__(self, base: nn.Linear, config: LoRAConfig, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.config = config
        self.scaling = config.scaling(rank, alpha)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=config.dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=config.dtype)
        if config.init == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / rank)
        nn.init.zeros_(self.lora_B.weight)
        self.lora_magnitude_vector: nn.Parameter | None = None
        if config.dora:
            self.lora_magnitude_vector = nn.Parameter(self.row_lengths(base.weight).to(config.dtype))

    def forward(self, input: Tensor, output: Tensor, base: nn.Linear) -> Tensor:
        """What the layer gives with this adapter.

        Args:
            input: [..., K].
            output: [..., N], what the layer gives without it.
            base: the layer.

        Returns:
            [..., N], in the wider dtype of ``output`` and the adapter.
        """
        dropped = self.dropout(input.to(self.lora_A.weight.dtype))
        update: Tensor = self.lora_B(self.lora_A(dropped)) * self.scaling
        if self.lora_magnitude_vector is None:
            return output + update
        factor = self.factor(base.weight)
        # The factor applies to what the weight gives, not to the bias, and while training to what it gives of the dropped input.
        product: Tensor = base(dropped.to(input.dtype)) if self.training and self.config.dropout else output
        if base.bias is not None:
            product = product - base.bias
        return output + (factor - 1) * product + factor * update

    def applied_to(self, weight: Tensor, dense: Tensor) -> Tensor:
        """What ``dense``, the decoded weight and other adapters [N, K], becomes with this one, in its dtype."""
        update = (self.lora_B.weight @ self.lora_A.weight).to(dense.dtype) * self.scaling
        if self.lora_magnitude_vector is None:
            return dense + update
        return self.factor(weight).to(dense.dtype)[:, None] * (dense + update)

    def factor(self, weight: Tensor) -> Tensor:
        """What each row of the adapted weight is multiplied by, to be of the length that was learned: [N]."""
        assert self.lora_magnitude_vector is not None
        return self.lora_magnitude_vector / self.row_lengths(weight)

    @torch.no_grad()
    def row_lengths(self, weight: Tensor) -> Tensor:
        """Lengths of the rows of the weight with the update: [N] of float32 or wider, a constant for gradients (DoRA, section 4.3).

        The weight is decoded each time, and nothing of it is kept. Never 0, so that an empty row stays one.
        """
        if is_dtensor(weight):
            raise ValueError(
                "LoRALinear: DoRA needs the base's weight, which is sharded apart from the adapter; "
                "call fully_shard on the LoRALinear or on what holds it, not on its base_layer"
            )
        with torch.autocast(weight.device.type, enabled=False):  # a length is a long sum
            dense = decoded(weight)
            adapted = torch.addmm(dense, self.lora_B.weight.to(dense.dtype), self.lora_A.weight.to(dense.dtype), alpha=self.scaling)
            lengths = torch.linalg.vector_norm(adapted, dim=1)
        result: Tensor = lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
        return result


def decoded(weight: Tensor) -> Tensor:
    """The dense weight in float32, or in its dtype if that is wider; it may be the weight itself."""
    if isinstance(weight, QuantizedTensor):
        # Not weight.dequantize(): torch.compile takes a tensor's methods for operators.
        with torch.enable_grad():  # else decoded scales would be kept, for products to come
            components = resolve(weight)
        weight = weight.format.dequantize(components, weight.shape, weight.dtype)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
