"""The demo's checks see what they are there to see."""

from __future__ import annotations

from typing import Any

import pytest

from demo.evaluation import accepted_lines
from demo.oracle import differing_answers
from demo.report import Report, misses
from demo.serving import Answers

GOOD: dict[str, Any] = {
    "loss_adamw": 4.0,
    "loss_adamw8bit": 4.07,
    "perplexity": {"bf16": 60.0, "nf4": 65.0, "int8": 60.1},
    "lora": {"before": 70.0, "after": 50.0, "merged": 51.0},
}


def missed(**changes: Any) -> list[str]:
    figures: Report = GOOD | changes  # type: ignore[assignment]
    return list(misses(figures))


def test_good_figures_miss_nothing() -> None:
    assert missed() == []


@pytest.mark.parametrize("loss", [4.09, float("nan")])
def test_a_worse_optimizer_is_named(loss: float) -> None:
    (miss,) = missed(loss_adamw8bit=loss)
    assert miss.startswith("train: AdamW8bit")


@pytest.mark.parametrize("nf4", [66.1, float("nan")])
def test_a_worse_format_is_named(nf4: float) -> None:
    (miss,) = missed(perplexity={"bf16": 60.0, "nf4": nf4, "int8": 60.0})
    assert miss.startswith("quantize: perplexity in NF4")


@pytest.mark.parametrize("after", [70.0, float("nan")])
def test_adapters_that_do_not_help_are_named(after: float) -> None:
    (miss,) = missed(lora={"before": 70.0, "after": after, "merged": after})
    assert miss.startswith("fine-tune:")


class Shouting:
    """An oracle whose answer is the prompt in capitals."""

    def completion(self, prompt: str) -> str:
        return prompt.upper()

    def chat(self, prompt: str) -> str:
        return prompt.upper() + "!"


def answers(**changes: Any) -> Answers:
    right = {
        "completion": "A",
        "streamed": "A",
        "chat": "A!",
        "alone": ["A", "B"],
        "together": ["A", "B"],
        "sample": "",
        "figures": {},
    }
    return Answers(**(right | changes))


def test_right_answers_do_not_differ() -> None:
    assert differing_answers(answers(), Shouting(), ["a", "b"]) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"completion": ""}, "the completion"),
        ({"streamed": "AB"}, "the streamed completion"),
        ({"chat": "A"}, "the chat completion"),
        ({"alone": ["A", "C"]}, "completion 2, asked alone"),
        ({"together": ["B", "B"]}, "completion 1, asked together"),
    ],
)
def test_a_differing_answer_is_named(changes: dict[str, Any], named: str) -> None:
    (miss,) = differing_answers(answers(**changes), Shouting(), ["a", "b"])
    assert miss.startswith(f"serve: {named}")


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("def f(x):\n    return x + 1\n", 1.0),
        ("x = f(1,\n\n  2)\n", 1.0),
        ('s = """open\n', 1.0),
        ("x = 'a\ny = 2\n", 0.5),
        ("", 0.0),
    ],
)
def test_accepted_lines(text: str, share: float) -> None:
    assert accepted_lines(text) == share
