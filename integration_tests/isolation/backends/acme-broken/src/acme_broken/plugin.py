"""Loads its library at import, as the contract says not to, and the library isn't there."""

from __future__ import annotations

import ctypes

library = ctypes.CDLL("libacme_npu.so.7")
