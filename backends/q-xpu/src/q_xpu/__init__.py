"""The q backend for Intel GPUs (XPU). It finds its devices, and serves the ops with q_triton's kernels and tiles of its own."""
