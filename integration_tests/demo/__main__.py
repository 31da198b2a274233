"""The command line: walk all five steps, print the table, write the report, say what missed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from demo import report, steps
from demo.evaluation import accepted_lines
from demo.settings import FULL, SMOKE, Settings


def main() -> int:
    """The exit code: 1 if anything missed."""
    parser = argparse.ArgumentParser(prog="python -m demo", description="Train, quantize, fine-tune and serve a small model.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for report.json, the model and the server's log")
    parser.add_argument("--device", type=torch.device, default="cpu", help="a torch device (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: every step in seconds, and figures that mean little")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    result, missed = walk(SMOKE if options.smoke else FULL, options.device, options.output)
    path = options.output / "report.json"
    report.write(result, path)
    print(f"\nA sample, of whose lines tokenize accepts {result['sample_accepted_lines']:.0%}:\n\n{result['sample']}\n")
    print(f"{report.table(result)}\n\n{sum(result['seconds'].values()):.0f} s in all; the figures are in {path}")
    for miss in missed:
        print(f"MISSED: {miss}", file=sys.stderr)
    return 1 if missed else 0


def walk(settings: Settings, device: torch.device, output: Path) -> tuple[report.Report, list[str]]:
    """Take all five steps: the report, and what missed."""
    seconds: dict[str, float] = {}
    with timed(seconds, "train"):
        text = steps.Text.read(settings)
        trained = steps.pretrain(settings, text, device)
    with timed(seconds, "quantize"):
        quantized = steps.quantize(trained.model, text)
    with timed(seconds, "fine-tune"):
        lora = steps.finetune(quantized.nf4, text, settings)
    with timed(seconds, "serve"):
        answers, differing = steps.serve(quantized.nf4, text, settings, output)
    result = report.Report(
        device=str(device),
        parameters=trained.model.num_parameters(),
        training_tokens=trained.tokens,
        training_dtype=trained.dtype,
        loss_adamw=trained.losses["AdamW"],
        loss_adamw8bit=trained.losses["AdamW8bit"],
        state_bytes_adamw=trained.state_bytes["AdamW"],
        state_bytes_adamw8bit=trained.state_bytes["AdamW8bit"],
        perplexity=quantized.perplexity,
        weight_bytes=quantized.weight_bytes,
        lora=lora,
        serve=answers.figures,
        sample=answers.sample,
        sample_accepted_lines=accepted_lines(answers.sample),
        seconds=seconds,
    )
    return result, [*report.misses(result), *differing]


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Announce a step, and note how long it took."""
    print(f"\n== {step}", flush=True)
    start = time.perf_counter()
    yield
    seconds[step] = round(time.perf_counter() - start, 1)


if __name__ == "__main__":
    sys.exit(main())
