"""The quantizer that transformers calls while it builds, loads and saves a model.

Modules are planned on the meta device first: what each will be, empty (:mod:`q_nn.hf.plan`). While weights are read, tensor by tensor, the
model keeps its own modules; a planned parameter is quantized, or put together from a checkpoint's parts, the moment its tensors are there,
so that no more than one is ever dense. At the end the loaded parameters move into the planned modules, which take their places. So what
transformers does to a checkpoint's tensors, such as merging experts into one parameter, works unchanged.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig as TheirBitsAndBytesConfig
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.quantizers import HfQuantizer

from q_core.formats.four_bit import FourBit
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WEIGHT_DTYPES
from q_nn.config import QConfig
from q_nn.hf.conversions import Assemble, Quantize, assembling_converters
from q_nn.hf.dense import dense_module
from q_nn.hf.hooks import move_hook
from q_nn.hf.plan import Plan, plan
from q_nn.hf.config import Served, described
from q_nn.hf_config import BitsAndBytesConfig
from q_nn.layers import replace_module
from q_nn.state_hooks import accepts

_log = logging.getLogger("q")


class QnnQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizes models as a :class:`q_nn.QConfig` says, and loads those that were.

    Args:
        quantization_config: what ``from_pretrained`` was given, or what :class:`q_nn.hf.registration.ConfigReader` read. Of transformers'
            own ``BitsAndBytesConfig`` it means the same as there, served by our layers (:func:`q_nn.hf.serve_bitsandbytes`).
        **kwargs: ``pre_quantized``, whether the checkpoint is.
    """

    requires_calibration = False

    def __init__(self, quantization_config: QConfig | Served | TheirBitsAndBytesConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.settings: QConfig | BitsAndBytesConfig
        if isinstance(quantization_config, Served):
            self.settings = quantization_config.settings
        elif isinstance(quantization_config, TheirBitsAndBytesConfig):
            self.settings = BitsAndBytesConfig.from_dict(quantization_config.to_dict())
        else:
            self.settings = quantization_config
        self.plan = Plan({}, {})

    # --- what transformers asks ---------------------------------------------------------------------------------------

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse to offload.

        Raises:
            ValueError: ``device_map`` puts modules on disk, or on the CPU beside another device. accelerate moves those to the other
                device at each forward, tensor by tensor, which would undo the quantization.
        """
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else {str(device_map)}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"from_pretrained: device_map puts modules on {', '.join(sorted(places))}; quantized weights can't be offloaded to the CPU "
                "or to disk. Name accelerators alone, or the CPU alone; or quantize to fewer bits"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype as it is, if quantized weights may decode to it."""
        if dtype not in WEIGHT_DTYPES:
            raise ValueError(f"from_pretrained: dtype is {dtype}, expected one of {', '.join(map(str, WEIGHT_DTYPES))}")
        return dtype

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return param_name in self.plan.parameters

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes an element, by which ``device_map="auto"`` shares a model out."""
        planned = self.plan.parameters.get(param_name)
        if planned is None or not planned.numel():
            return float(super().param_element_size(model, param_name, param))
        return planned.stored_bytes / planned.numel()

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside quantized layers train."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    # --- loading --------------------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        self.plan = plan(model, self.settings)

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self.plan)

    def get_weight_conversions(self) -> list[WeightConverter]:
        return assembling_converters(self.plan) if self.pre_quantized else []

    def get_new_dtype(self, converter: WeightTransform, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Keep the loader from casting parts of quantized parameters, which it can't tell from weights."""
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, Assemble):
                operation.dtype = dtype
                return None
        return super().get_new_dtype(converter, param, dtype)  # type: ignore[no-any-return]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Put the planned modules, with the loaded parameters, in their places."""
        left_dense = []
        formats = []
        for name, new in self.plan.modules.items():
            old = model.get_submodule(name)
            own = {k: p for k, p in new._parameters.items() if isinstance(p, QuantizedTensor)}
            loaded = {key: old._parameters[key] for key in own}
            if not all(isinstance(parameter, QuantizedTensor) for parameter in loaded.values()):
                left_dense.append(name)
                continue
            for key, parameter in loaded.items():
                assert isinstance(parameter, QuantizedTensor)
                if not accepts(new, parameter.format):
                    raise ValueError(
                        f"from_pretrained: {name}.{key} is held as {parameter.format}, expected what {type(new).__name__} takes"
                    )
                formats.append(parameter.format)
            _take_over(old, new)
            replace_module(model, old, new)
            move_hook(old, new)
        if left_dense:
            _log.warning("from_pretrained: %s not in the checkpoint, so newly initialized and not quantized", ", ".join(left_dense))
        self._check_nothing_else(model)
        four_bit = any(isinstance(format, FourBit) for format in formats)
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = four_bit, bool(formats) and not four_bit  # for PEFT and accelerate
        self._keep_merged(model)
        model.config.quantization_config = described(model)
        return model

    def _check_nothing_else(self, model: PreTrainedModel) -> None:
        for name, module in model.named_modules():
            if name not in self.plan.modules and any(isinstance(p, QuantizedTensor) for p in module._parameters.values()):
                raise ValueError(f"from_pretrained: the checkpoint holds {name} quantized, but config.json doesn't say so of it")

    def _keep_merged(self, model: PreTrainedModel) -> None:
        """Drop the conversions that saving would undo: they cut and join dense tensors, and these are none any more."""
        quantized = [name for name, parameter in model.named_parameters() if isinstance(parameter, QuantizedTensor)]
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not isinstance(conversion, WeightConverter) or not _makes_any(conversion, quantized)
        ]

    # --- saving, and going back -------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """Bring config.json up to date, before it is written: layers may have been merged, added, dequantized."""
        if not getattr(model, "_hf_peft_config_loaded", False):
            model.config.quantization_config = described(model)
        return None, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """``model.dequantize()``: dense layers, as the quantized ones decode."""
        for module in list(model.modules()):
            if any(isinstance(parameter, QuantizedTensor) for parameter in module._parameters.values()):
                dense = dense_module(module, dtype)
                replace_module(model, module, dense)
                move_hook(module, dense)
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
        return model


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Move what was loaded into ``old`` to ``new``, which has the same names for it."""
    new._parameters.update(old._parameters)
    new._buffers.update(old._buffers)
    new.train(old.training)
    new._is_hf_initialized = True  # type: ignore[assignment]


def _makes_any(conversion: WeightConverter, names: list[str]) -> bool:
    if any(isinstance(operation, Assemble) for operation in conversion.operations):
        return True
    patterns = [re.compile(pattern.replace("*", ".*").replace(r"\1", ".*")) for pattern in conversion.target_patterns]
    return any(pattern.search(name) for pattern in patterns for name in names)
