"""The q backend for NVIDIA GPUs (CUDA). It finds its devices, and serves the ops with q_triton's kernels and tiles of its own."""
