"""The quantizer that transformers calls while it builds, loads and saves a model.

Modules are planned on the meta device first: what each will be, empty (:mod:`q_nn.hf.plan`). While weights are read, tensor by tensor, the
model keeps its own modules; a planned parameter is quantized, or put together from a checkpoint's parts, the moment its tensors are there,
so that no more than one is ever dense. At the end the loaded parameters move into the planned modules, which take their places. So what
transformers does to a checkpoint's tensors, such as merging experts into one parameter, works unchanged.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig as TheirBitsAndBytesConfig
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter, WeightTransform
from transformers.quantizers.base import HfQuantizer

from q_core.formats.four_bit import FourBit
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WEIGHT_DTYPES
from q_nn.config import QConfig
from q_nn.hf.config import Served, described
from q_nn.hf.conversions import Assemble, Quantize, assembling_converters
from q_nn.hf.dense import dense_module
from q_nn.hf.hooks import move_hook
from q_nn.hf.plan import Plan, plan
from q_nn.hf_config import BitsAndBytesConfig
from q_nn.save import tensors_by_module
from q_nn.state_hooks import accepts

_FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit")
"""By which PEFT and accelerate know quantized models."""

_CONVERSIONS = "_weight_conversions"
"""Where transformers keeps what it did to the checkpoint's tensors, to undo it when it saves."""

_CODES = (torch.int8, torch.uint8, torch.float8_e4m3fn)

_log = logging.getLogger("q")


class QnnQuantizer(HfQuantizer):
    """Quantizes models as a :class:`q_nn.QConfig` says, and loads those that were.

    Args:
        quantization_config: what ``from_pretrained`` was given, or what :class:`q_nn.hf.registration.ConfigReader` read. Of transformers'
            own ``BitsAndBytesConfig`` it means the same as there, served by our layers (:func:`q_nn.hf.serve_bitsandbytes`).
        **kwargs: ``pre_quantized``, whether the checkpoint is.
    """

    requires_calibration = False

    def __init__(self, quantization_config: QConfig | Served | TheirBitsAndBytesConfig, **kwargs: Any) -> None:
        config: Any = (
            quantization_config  # which need not be of transformers' class: it is asked for quant_method and to_dict alone
        )
        super().__init__(config, **kwargs)
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
        return param_name in self.plan.formats

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes an element, by which ``device_map="auto"`` shares a model out."""
        format = self.plan.formats.get(param_name)
        if format is None or not param.numel():
            return float(super().param_element_size(model, param_name, param))
        return sum(component.nbytes for component in format.empty(param.shape, "meta").values()) / param.numel()

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
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Put quantized modules in the places of the planned ones."""
        dense = []
        future: dict[int, nn.Module] = {}
        for name, planned in self.plan.modules.items():
            old = model.get_submodule(name)
            loaded = {own: old._parameters[own] for own in planned.formats}
            weights: dict[str, Any] = {own: weight for own, weight in loaded.items() if isinstance(weight, QuantizedTensor)}
            if len(weights) < len(planned.formats):
                dense.append(name)
                continue
            new = planned.build(old, weights)
            new._parameters.update(weights)  # the very parameters, so that what is tied stays so
            for own, weight in weights.items():
                if not accepts(new, weight.format):
                    raise ValueError(
                        f"from_pretrained: {name}.{own} is held as {weight.format}, expected what {type(new).__name__} takes"
                    )
            future[id(old)] = new
        if dense:
            _log.warning("from_pretrained: not in the checkpoint, so newly initialized and not quantized: %s", ", ".join(dense))
        _replace(model, future)
        _check_nothing_else(model)
        mark(model)
        return model

    # --- saving, and going back -------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What to write, each tied weight once; and bring config.json up to date: layers may have been merged, or replaced."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # transformers asks the model for its adapters
        model.config.quantization_config = described(model)
        return {key: tensor for group in tensors_by_module(model).values() for key, tensor in group.items()}, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """``model.dequantize()``: dense layers, as the quantized ones decode."""
        wanted: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a config may have its name
        holds = (module for module in model.modules() if any(isinstance(p, QuantizedTensor) for p in module._parameters.values()))
        _replace(model, {id(module): dense_module(module, wanted) for module in holds})
        for flag in _FLAGS:
            setattr(model, flag, False)
        return model


def _check_nothing_else(model: PreTrainedModel) -> None:
    """Refuse codes in the place of weights, which the loader puts there if their shape is right."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in _CODES and not isinstance(parameter, QuantizedTensor):
            raise ValueError(
                f"from_pretrained: the checkpoint holds {name} quantized, as {parameter.dtype}, but config.json doesn't say so of it"
            )


def _replace(model: nn.Module, future: Mapping[int, nn.Module]) -> None:
    """Put modules in the places of others, by the others' ``id``, under all names they have."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in future:
                new = future[id(child)]
                move_hook(child, new)
                setattr(parent, name, new)


def mark(model: PreTrainedModel) -> None:
    """Tell transformers, PEFT and accelerate that a model is quantized, as they look for it.

    Conversions that saving would undo are dropped where they make quantized parameters: they cut and join dense tensors.
    """
    formats = [parameter.format for parameter in model.parameters() if isinstance(parameter, QuantizedTensor)]
    four_bit = any(isinstance(format, FourBit) for format in formats)
    for flag, holds in zip(_FLAGS, (four_bit, bool(formats) and not four_bit), strict=True):
        setattr(model, flag, holds)
    quantized = [name for name, parameter in model.named_parameters() if isinstance(parameter, QuantizedTensor)]
    conversions = getattr(model, _CONVERSIONS, None)
    if conversions is None:  # the model wasn't loaded
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
    kept = [c for c in conversions if not isinstance(c, WeightConverter) or not _makes_any(c, quantized)]
    setattr(model, _CONVERSIONS, kept)
    model.config.quantization_config = described(model)


def _makes_any(conversion: WeightConverter, names: list[str]) -> bool:
    if any(isinstance(operation, Assemble) for operation in conversion.operations):
        return True
    patterns = [re.compile(pattern.replace("*", ".*").replace(r"\1", ".*")) for pattern in conversion.target_patterns]
    return any(pattern.search(name) for pattern in patterns for name in names)
