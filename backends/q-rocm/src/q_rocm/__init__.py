"""The q backend for AMD GPUs (ROCm). It finds its devices; it carries no ops yet, so the reference serves them there."""
