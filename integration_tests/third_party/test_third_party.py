"""A vendor's distribution, installed beside the others from its wheel: it conforms, it is chosen, and the stack above runs on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from isolation.environment import Environment, build_wheel

ACME = Path(__file__).with_name("acme-q")
END_TO_END = Path(__file__).parents[1] / "isolation" / "end_to_end.py"
ITS_OPS = ("quantize_blockwise", "gemm_4bit", "paged_attention")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("environment"))
    made.install(build_wheel(ACME, tmp_path_factory.mktemp("build")))
    return made


def explained(environment: Environment, op: str) -> dict[str, Any]:
    command = "import sys; from q_core.cli import main; sys.exit(main())"  # q-core itself is lent, and its script isn't here
    answer: dict[str, Any] = json.loads(environment.run("-c", command, "explain", op, "--json"))
    return answer


def test_it_passes_the_conformance_suite(environment: Environment, tmp_path: Path) -> None:
    shutil.copytree(ACME / "tests", tmp_path / "tests")
    said = environment.run("-m", "pytest", "-q", "-rsx", "-p", "no:cacheprovider", "tests", cwd=tmp_path)
    assert " passed" in said and "xfailed" not in said
    # None of its ops mutates anything.
    assert all("empty parameter set" in line for line in said.splitlines() if line.startswith("SKIPPED"))


@pytest.mark.parametrize("op", ITS_OPS)
def test_it_is_chosen_by_priority(environment: Environment, op: str) -> None:
    answer = explained(environment, op)
    assert answer["served_by"] == "acme"
    asked = [verdict["backend"] for verdict in answer["verdicts"]]
    assert asked.index("acme") < asked.index("reference")


def test_what_it_lacks_goes_to_the_next(environment: Environment) -> None:
    answer = explained(environment, "quantize_4bit")
    assert answer["served_by"] == "q_cpu"
    assert {"backend": "acme", "reason": "it has no quantize_4bit"} in answer["verdicts"]


def test_what_it_declines_is_said_in_its_words(environment: Environment) -> None:
    ask = "import q_core; print(q_core.explain('gemm_4bit', quant_type='other'))"
    assert "acme: declines: quant_type 'other', only nf4 and fp4" in environment.run("-c", ask)


def test_a_model_is_quantized_trained_and_served_by_it(environment: Environment, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    environment.run(str(END_TO_END), str(report), cwd=tmp_path)
    found = json.loads(report.read_text())
    assert found["tokens"] == found["tokens_of_transformers"]
    assert found["losses"][-1] < found["losses"][0]
    # Two layers of seven linears: forwards in training and steps in serving; each step attends in both layers.
    tokens = max(map(len, found["tokens"]))
    assert found["acme_calls"]["quantize_blockwise"] >= 14  # the double-quantized scales of every linear
    assert found["acme_calls"]["gemm_4bit"] >= 14 * (len(found["losses"]) + tokens)
    assert found["acme_calls"]["paged_attention"] >= 2 * tokens
    stood_in = [message for message in found["messages"] if message.startswith(ITS_OPS) and "the reference serves it" in message]
    assert not stood_in
