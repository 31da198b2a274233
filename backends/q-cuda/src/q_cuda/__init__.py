"""The q backend for NVIDIA GPUs (CUDA). It finds its devices; it carries no ops yet, so the reference serves them there."""
