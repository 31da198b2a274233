"""Read the weights of a checkpoint that another program quantized, whichever it was."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from q_core.formats.quantized_tensor import check_dtype
from q_core.formats.weight_format import WeightFormat
from q_nn.readers.directory import read_directory
from q_nn.readers.gguf import read_gguf


def read_weights(
    source: str | PathLike[str], *, dtype: torch.dtype | None = None, requantize: WeightFormat | None = None
) -> dict[str, Tensor]:
    """Read the weights of a checkpoint that another program quantized.

    Args:
        source: a Hugging Face directory whose config.json has a ``quantization_config`` of GPTQ (4 or 8 bits), AWQ (GEMM) or
            compressed-tensors (4-bit packed, 8-bit), or a GGUF file (Q4_0, Q8_0, Q4_K and plain types).
        dtype: what quantized weights decode to: float32, bfloat16 or float16; by default their scales' dtype. Plain tensors are left as
            they are.
        requantize: decode quantized weights and quantize them to this format instead; its error comes on top of theirs.

    Returns:
        Tensors by their keys in the model: a :class:`QuantizedTensor` for each quantized weight, others as they are. Of a GGUF file that
        isn't of the llama family the names are those of the file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError, TypeError: a file is damaged, a setting unknown or not supported, or tensors contradict the settings or each other; the
            message names the key, what was got and what was expected.
    """
    if dtype is not None:
        check_dtype("read_weights: dtype", dtype)
    path = Path(source)
    read = read_directory if path.is_dir() else read_gguf
    return read(path, dtype, requantize)
