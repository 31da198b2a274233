"""Checkpoints that other programs quantized, read into our formats: GPTQ, AWQ, compressed-tensors and GGUF.

A reader knows one layout. What it reads it describes as integers in groups (:mod:`q_nn.readers.grouped_weight`), which says what of the
weights is exact; GGUF's Q4_K has a format of its own (:mod:`q_nn.readers.gguf`).
"""

from q_nn.readers.directory import quantized_elsewhere
from q_nn.readers.load import load_foreign
from q_nn.readers.read import read_weights

__all__ = ["load_foreign", "quantized_elsewhere", "read_weights"]
