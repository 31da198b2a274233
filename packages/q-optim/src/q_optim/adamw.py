"""AdamW (arXiv 1711.05101) with states in 8 bits (arXiv 2110.02861) or 32."""

from __future__ import annotations

from typing import Literal

from torch.optim.optimizer import ParamsT

from q_optim.blockwise import BlockwiseOptimizer


class AdamW(BlockwiseOptimizer):
    """AdamW at a precision of its states; what users name is :class:`AdamW8bit`."""

    rule = "adamw"

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bits: Literal[8, 32],
        min_8bit_size: int = 4096,
        blocksize: int = 256,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bits=bits,
            min_8bit_size=min_8bit_size,
            blocksize=blocksize,
        )


class AdamW8bit(AdamW):
    """AdamW whose two moments take 2.03 bytes a parameter instead of 8.

    The update is that of ``torch.optim.AdamW``, decoupled weight decay first; the moments are held as 8-bit codes in blocks, each block
    with its own scale. Tensors below ``min_8bit_size`` keep theirs in float32. A parameter whose gradients are all zero and that has no
    weight decay never moves. A non-finite gradient leaves its block (in 32 bits: its element) as it was.

    Args:
        params: parameters, groups of them, or named ones, as torch optimizers take them: float32, bfloat16 or float16. A group may have
            its own value of each argument below.
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, a share of ``lr``.
        min_8bit_size: number of elements from which a tensor's states are held in 8 bits.
        blocksize: elements a scale, a power of two in 32…4096.

    Raises:
        ValueError, TypeError: a hyper-parameter or a parameter is not as above; the message names it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = 4096,
        blocksize: int = 256,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bits=8,
            min_8bit_size=min_8bit_size,
            blocksize=blocksize,
        )
