"""An embedding that trains well with 8-bit optimizers (arXiv 2110.02861, 2.3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from q_core.optimizers import prefer


class StableEmbedding(nn.Embedding):
    """``torch.nn.Embedding`` with Xavier's initialization and a layer norm after it; optimizers keep the weight's states in 32 bits.

    Embeddings' gradients vary most, from token to token, and are what 8-bit states hurt first. State dicts are those of
    ``bitsandbytes.nn.StableEmbedding``.

    Args:
        num_embeddings: size of the vocabulary.
        embedding_dim: size of a vector.
        **arguments: the rest of ``torch.nn.Embedding``'s.

    Raises:
        ValueError: sparse gradients are asked for, which no 8-bit optimizer takes.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, **arguments: Any) -> None:
        if arguments.get("sparse"):
            raise ValueError("StableEmbedding: sparse is True, expected False; optimizers with 8-bit states take dense gradients")
        super().__init__(num_embeddings, embedding_dim, **arguments)
        self.norm = nn.LayerNorm(embedding_dim, device=arguments.get("device"))
        self._state_preference()

    def _state_preference(self) -> None:
        prefer(self, "weight", optim_bits=32)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy is another module, which must say for itself what it wants.
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._state_preference()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        """Vectors of the tokens, normalized in the norm's own precision: [..., embedding_dim], in the weight's dtype."""
        normalized: Tensor = self.norm(super().forward(input).to(self.norm.weight.dtype))
        return normalized.to(self.weight.dtype)
