"""What touches tensors: the model runner and the sampler."""
