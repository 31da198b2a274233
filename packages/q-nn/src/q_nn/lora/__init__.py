"""Low-rank adapters over frozen linear layers (LoRA, arXiv 2106.09685), quantized ones too (QLoRA, arXiv 2305.14314)."""

from q_nn.lora.config import LoRAConfig
from q_nn.lora.layer import LoRALinear
from q_nn.lora.merge import merge_lora, unmerge_lora
from q_nn.lora.model import add_lora, disable_lora, enable_lora, lora_adapters, remove_lora, set_lora
from q_nn.lora.peft_files import load_lora, save_lora
from q_nn.lora.saved_module import TrainedModule

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "TrainedModule",
    "add_lora",
    "disable_lora",
    "enable_lora",
    "load_lora",
    "lora_adapters",
    "merge_lora",
    "remove_lora",
    "save_lora",
    "set_lora",
    "unmerge_lora",
]
