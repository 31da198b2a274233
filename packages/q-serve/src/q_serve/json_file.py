"""Reading a JSON file of a model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from q_serve.errors import ModelError

MAX_BYTES = 1 << 28
"""A tokenizer.json of 256 k tokens is about 30 MB; what is far beyond is no configuration."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ModelError: it is missing, too large, not JSON, or not an object; the message names the file.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ModelError(f"{path}: larger than {MAX_BYTES} bytes, which no configuration is")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON {type(value).__name__}, expected an object")
    return value
