"""What the optimizers' precisions cost and save: losses, memory, and time when paged. Run by ``nox -s optimizers``."""
