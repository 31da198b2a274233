"""The q backend for Intel GPUs (XPU). It finds its devices; it carries no ops yet, so the reference serves them there."""
