"""A backend of the q-core op surface: numpy on CPU tensors."""

__version__ = "1.0.0"
