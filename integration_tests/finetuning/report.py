"""The figures as a page of the documentation, and as tables of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from finetuning import quality
from finetuning.memory import ALLOCATOR, SHARE, STEPS, WAYS, Memory, Size
from pages import table


def markdown(memories: Sequence[Memory], size: Size, perplexities: Mapping[str, float], errors: Sequence[quality.Error]) -> str:
    """The page."""
    allocator = ", ".join(f"{name}={value}" for name, value in ALLOCATOR.items())
    dense = perplexities[quality.DENSE]
    return "\n".join(
        [
            "# What fine-tuning a quantized model takes, and costs",
            "",
            "Written by `nox -s finetuning`.",
            "",
            "## Memory of a training step",
            "",
            f"A Llama of transformers with {memories[0].parameters / 1e6:.0f} million parameters: width {size.hidden},",
            f"{size.layers} layers, {size.vocabulary:,} tokens, embedding and output apart. {size.batch} × {size.length} tokens,",
            f"{size.threads} threads. Adapters of rank {size.rank} on all linear layers but the output; these and their gradients are",
            "float32, the rest of that model is bfloat16.",
            "",
            "Measured, each row in a process of its own: the most that was resident (VmHWM of Linux) while",
            f"{STEPS} steps were made, forward, backward and optimizer, less what was resident when everything was imported and",
            "nothing made. What making the model took doesn't count; the high-water mark is set anew after that. The allocator is",
            f"glibc's with {allocator}, which gives freed tensors back at once; with its defaults it may keep some.",
            f"The last row may take {SHARE:.0%} of the first.",
            "",
            *memory_table(memories),
            "",
            "## Perplexity",
            "",
            "The demo's Llama of 4 million parameters, trained on the Python standard library's sources, on files held out.",
            "",
            *table(
                ("weights", "perplexity", "× bfloat16", "at most"),
                [
                    (quality.DENSE, f"{dense:.3f}", "", ""),
                    *(
                        (
                            format.title,
                            f"{perplexities[format.title]:.3f}",
                            f"{perplexities[format.title] / dense:.4f}",
                            f"{format.perplexity_bound}",
                        )
                        for format in quality.FORMATS
                    ),
                ],
            ),
            "",
            "## Errors of the output",
            "",
            "Small models of random weights in float32, beside the same ones dense; relative errors, of root mean squares. A layer whose",
            "weights err by ε, each by itself, has an output that errs by ε, and by ε√2 if its input is rounded too, as LLM.int8() does.",
            "The errors of layers in series add as squares. So the output of a model with n quantized layers may err by ε√n, by ε√(2n)",
            "with rounded inputs; residual connections, which pass layers by, make it less.",
            "",
            *table(
                ("model", "weights", "layers", "error of weights", "of the output", "at most"),
                [
                    (e.architecture, e.format, str(e.layers), f"{e.weights:.2%}", f"{e.output:.2%}", f"{e.allowed:.2%}")
                    for e in errors
                ],
            ),
            "",
        ]
    )


def memory_table(memories: Sequence[Memory]) -> list[str]:
    """Memory by the way of training."""
    titles = {way.name: way.title for way in WAYS}
    first = memories[0].peak
    return table(
        ("what is trained, and how", "trained", "weights, MB", "states, MB", "peak of a step, MB", "of the first"),
        [
            (
                titles[m.way],
                f"{m.trained / 1e6:.1f} M",
                f"{m.weights / 1e6:.0f}",
                f"{m.states / 1e6:.0f}",
                f"{m.peak / 1e6:.0f}",
                f"{m.peak / first:.1%}",
            )
            for m in memories
        ],
    )
