"""What fine-tuning a quantized model takes and costs: memory of a step, perplexity, errors. Run by ``nox -s finetuning``."""
