"""A model that was quantized in place, made one that transformers knows to be quantized."""

from __future__ import annotations

from transformers import PreTrainedModel

from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn.config import QUANT_METHOD
from q_nn.describe import describe
from q_nn.hf.quantizer import QnnQuantizer, mark


def adopt(model: PreTrainedModel) -> PreTrainedModel:
    """Tell transformers and PEFT that a model is quantized, after :func:`q_nn.quantize` or :func:`q_nn.load_into`.

    Then ``model.save_pretrained``, ``Trainer``, ``prepare_model_for_kbit_training`` and ``model.dequantize`` do with it what they do with
    one that ``from_pretrained`` quantized. (:func:`q_nn.save_pretrained` and ``get_peft_model`` don't need it.)

    Args:
        model: mutated.

    Returns:
        ``model``.

    Raises:
        TypeError: it is no model of transformers.
        ValueError: nothing of it is quantized.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"adopt: model is {type(model).__name__}, expected a transformers.PreTrainedModel")
    description = describe(model)
    if description is None:
        raise ValueError(f"adopt: no weight is a {QuantizedTensor.__name__}; call q_nn.quantize(model, config) first")
    told = {"hf_quantizer": QnnQuantizer(description), "is_quantized": True, "quantization_method": QUANT_METHOD}
    for name, value in told.items():
        setattr(model, name, value)
    mark(model)
    return model
