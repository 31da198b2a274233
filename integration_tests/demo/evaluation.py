"""How good a model is: perplexity of held-out text, and whether what it writes looks like Python."""

from __future__ import annotations

import io
import math
import tokenize

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

BATCH = 8


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Tensor, *, title: str) -> float:
    """Exponential of the mean loss over windows of tokens, int64 [windows, length]."""
    batches = windows.to(model.device).split(BATCH)
    total = sum(
        model(input_ids=ids, labels=ids, use_cache=False).loss.item() * len(ids)
        for ids in tqdm(batches, desc=f"perplexity, {title}", unit="batch")
    )
    return math.exp(total / len(windows))


def accepted_lines(text: str) -> float:
    """The share of a text's lines, blank ones apart, that Python's ``tokenize`` accepts."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return sum(map(_is_accepted, lines)) / len(lines) if lines else 0.0


def _is_accepted(line: str) -> bool:
    """A bracket or a string that the line leaves open is no fault: the next line may close it."""
    try:
        return all(token.type != tokenize.ERRORTOKEN for token in tokenize.generate_tokens(io.StringIO(line).readline))
    except tokenize.TokenError as error:
        return "EOF in multi-line" in error.args[0]
