"""Quantized modules, fine-tuning and checkpoints."""

from q_core.formats.four_bit import FourBit
from q_core.formats.fp8_rows import Fp8Rows
from q_core.formats.grouped_int import AffineGroups, SuperGroups
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn.config import QConfig
from q_nn.convert import quantize_module
from q_nn.data_parallel import prepare_ddp
from q_nn.disk import quantize_checkpoint
from q_nn.embedding import Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4
from q_nn.estimate import Estimate, estimate
from q_nn.experts import QuantizedExperts
from q_nn.linear4bit import Linear4bit, LinearFP4, LinearNF4
from q_nn.linear8bit import Linear8bitLt
from q_nn.linear_grouped import LinearGroupedInt
from q_nn.linear_int8 import LinearInt8
from q_nn.load import load_into
from q_nn.lora import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    disable_lora,
    enable_lora,
    load_lora,
    lora_adapters,
    merge_lora,
    remove_lora,
    save_lora,
    set_lora,
    unmerge_lora,
)
from q_nn.memory import MemoryReport, MemoryRow, memory_report, weight_bytes
from q_nn.outlier_aware import OutlierAwareLinear, observe_outliers
from q_nn.peak import PeakMemory, measure_peak
from q_nn.plan import PlannedLayer, QuantizePlan, plan_quantization
from q_nn.quantize import quantize
from q_nn.readers import load_foreign, read_weights
from q_nn.replace import replace_linears
from q_nn.report import KeptParameter, QuantizedLayer, QuantizeReport
from q_nn.rules import QRule
from q_nn.save import save_pretrained
from q_nn.stable_embedding import StableEmbedding
from q_nn.state_hooks import prepare

__version__ = "0.1.0"

__all__ = [
    "AffineGroups",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Estimate",
    "FourBit",
    "Fp8Rows",
    "Int8Rows",
    "KeptParameter",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearGroupedInt",
    "LinearInt8",
    "LinearNF4",
    "LoRAConfig",
    "LoRALinear",
    "MemoryReport",
    "MemoryRow",
    "OutlierAwareLinear",
    "PeakMemory",
    "PlannedLayer",
    "QConfig",
    "QRule",
    "QuantizePlan",
    "QuantizeReport",
    "QuantizedExperts",
    "QuantizedLayer",
    "QuantizedTensor",
    "StableEmbedding",
    "SuperGroups",
    "add_lora",
    "disable_lora",
    "enable_lora",
    "estimate",
    "load_foreign",
    "load_into",
    "load_lora",
    "lora_adapters",
    "measure_peak",
    "memory_report",
    "merge_lora",
    "observe_outliers",
    "plan_quantization",
    "prepare",
    "prepare_ddp",
    "quantize",
    "quantize_checkpoint",
    "quantize_module",
    "read_weights",
    "remove_lora",
    "replace_linears",
    "save_lora",
    "save_pretrained",
    "set_lora",
    "unmerge_lora",
    "weight_bytes",
]
