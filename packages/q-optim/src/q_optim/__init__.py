"""Optimizers whose states take a quarter of the memory."""

from q_optim.adamw import AdamW8bit
from q_optim.memory import state_bytes

__version__ = "0.1.0"

__all__ = ["AdamW8bit", "state_bytes"]
