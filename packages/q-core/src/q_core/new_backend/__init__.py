"""A complete backend to begin with: ``q-core new-backend acme-npu``."""

from q_core.new_backend.generate import generate

__all__ = ["generate"]
