"""Quantized modules, fine-tuning and checkpoints."""

from q_core.formats.four_bit import FourBit
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn.config import QConfig
from q_nn.data_parallel import prepare_ddp
from q_nn.linear import Linear4bit, LinearFP4, LinearNF4
from q_nn.linear8bit import Linear8bitLt
from q_nn.load import load_into
from q_nn.lora import LoRAConfig, LoRALinear, add_lora, merge_lora
from q_nn.memory import weight_bytes
from q_nn.outlier_aware import OutlierAwareLinear, observe_outliers
from q_nn.quantize import KeptParameter, QuantizedLayer, QuantizeReport, quantize
from q_nn.replace import replace_linears
from q_nn.save import save_pretrained
from q_nn.stable_embedding import StableEmbedding
from q_nn.state_hooks import prepare

__version__ = "0.1.0"

__all__ = [
    "FourBit",
    "Int8Rows",
    "KeptParameter",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "LoRAConfig",
    "LoRALinear",
    "OutlierAwareLinear",
    "QConfig",
    "QuantizeReport",
    "QuantizedLayer",
    "QuantizedTensor",
    "StableEmbedding",
    "add_lora",
    "load_into",
    "merge_lora",
    "observe_outliers",
    "prepare",
    "prepare_ddp",
    "quantize",
    "replace_linears",
    "save_pretrained",
    "weight_bytes",
]
