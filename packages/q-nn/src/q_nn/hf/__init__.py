"""Hugging Face transformers loads, saves and trains models with this package's layers (extra: ``q-nn[hf]``).

``AutoModelForCausalLM.from_pretrained(directory, quantization_config=QConfig("nf4"))`` needs no more than ``import q_nn``. Importing this
module besides lets transformers read directories whose config.json says ``"quant_method": "q_nn"``: those with formats that bitsandbytes
doesn't have. transformers looks for no plugins, so somebody has to say ``import q_nn.hf``.
"""

from __future__ import annotations

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError("q_nn.hf needs transformers, 5.23 or later: pip install 'q-nn[hf]'") from error

from q_nn.hf.adopting import adopt
from q_nn.hf.loading import from_pretrained
from q_nn.hf.registration import register, serve_bitsandbytes

del _transformers
register()

__all__ = ["adopt", "from_pretrained", "register", "serve_bitsandbytes"]
