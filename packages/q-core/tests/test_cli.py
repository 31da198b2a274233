"""The ``q-core`` command in this process: what each subcommand says, and its exit code."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import q_core
from q_core import Availability, Backend, BackendError, impl
from q_core.cli import COMMANDS, main
from q_core.testing import family_module, installed_backends

Said = tuple[int, str, str]
Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> Said:
        try:
            code = main(arguments)
        except SystemExit as exit:  # argparse's
            code = int(str(exit.code))
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def backend(name: str = "acme", **settings: Any) -> Backend:
    usual: dict[str, Any] = {
        "device_types": ("cpu",),
        "surface_version": 1,
        "priority": 200,
        "probe": lambda: Availability(True, "made up"),
    }
    return Backend(name, **(usual | {"families": ("acme_cli",)} | settings))


@pytest.fixture
def acme() -> Iterator[None]:
    """Serves rms_norm of float32, and silu_and_mul with NaN in place of what is right."""

    @impl(accepts=lambda x: None if x.dtype is torch.float32 else f"dtype {x.dtype}, only float32")
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps).contiguous()

    @impl
    def silu_and_mul(x: Tensor) -> Tensor:
        return x.new_full((*x.shape[:-1], x.shape[-1] // 2), float("nan"))

    with family_module("acme_cli", rms_norm, silu_and_mul), installed_backends(backend()):
        yield


def test_every_subcommand_has_json_and_help(run: Run) -> None:
    for command in COMMANDS:
        code, out, _ = run(command, "--help")
        assert code == 0 and "--json" in out and out.startswith(f"usage: q-core {command}")
    assert run("--version")[:2] == (0, f"q-core {q_core.__version__}\n")


def test_ops(run: Run) -> None:
    assert run("ops")[0] == 0
    (op,) = json.loads(run("ops", "rms_norm", "--json")[1])
    assert op["op"] == "rms_norm" and "Root-mean-square norm" in op["contract"]
    assert op["operands"][1] | {"text": ""} == {
        "tensor": "weight", "formats": [], "dtypes": ["x"], "axes": "K", "flat": False,
        "mutated": False, "optional": False, "neutral": None, "text": "",
    }  # fmt: skip
    assert [output["text"] for output in op["outputs"]] == ["that of x [..., K]"]
    assert "w13_scale     float32 [E, 2N] (int8, fp8)\n" in run("ops", "fused_moe")[1]
    said = run("ops", "write_kv")[1]
    assert "k_scale_BGS   float32 [B, G, S], or None, mutated\n" in said and "Results" not in said
    assert said.startswith("q::write_kv(Tensor k_TGD") and "attention: Attention over a paged KV cache." in said
    assert "Mutates: k_cache_BGSD, v_cache_BGSD, k_scale_BGS, v_scale_BGS.\nA backend may leave out: k_scale_BGS (None)" in said
    code, _, err = run("ops", "gemm_5bit")
    assert code == 2 and err.startswith("q-core: unknown op 'gemm_5bit', expected one of: quantize_blockwise")


@pytest.mark.usefixtures("acme")
def test_explain_asks_about_a_call(run: Run) -> None:
    assert run("explain", "rms_norm")[1].startswith("rms_norm on cpu: served by acme")
    said = json.loads(run("explain", "rms_norm", "--dtype", "bfloat16", "--json")[1])
    assert said["served_by"] == "reference"
    assert said["verdicts"][0] == {"backend": "acme", "reason": "dtype torch.bfloat16, only float32"}
    assert run("explain", "rms_norm", "eps=0.5")[0] == 0
    assert run("explain", "gemm_4bit", "layout=acme.none")[0] == 1, "nobody serves it"
    for wrong, message in {
        "eps": "'eps' is no setting, expected NAME=VALUE",
        "epsilon=1": "rms_norm has no argument 'epsilon', expected one of: x, weight, eps",
    }.items():
        code, _, err = run("explain", "rms_norm", wrong)
        assert code == 2 and message in err


def test_a_setting_is_a_literal_or_a_string(run: Run) -> None:
    @impl(accepts=lambda quant_type, blocksize, shape: f"{quant_type!r} {blocksize!r} {shape!r}")
    def gemm_4bit(x_TK: Tensor, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: list[int]) -> Tensor:
        raise AssertionError("declined")

    with family_module("acme_cli", gemm_4bit), installed_backends(backend()):
        assert (
            "acme: declines: 'fp4' 128 [3, 4]" in run("explain", "gemm_4bit", "quant_type=fp4", "blocksize=128", "shape=[3,4]")[1]
        )


@pytest.mark.usefixtures("acme")
def test_doctor_tells_what_is_declined(run: Run) -> None:
    code, out, _ = run("doctor")
    assert code == 0 and "acme (" in out
    assert json.loads(run("doctor", "--json")[1])["ops"]["rms_norm"] == "acme"
    code, _, err = run("doctor", "--device", "blah")
    assert code == 2 and "expected one that torch knows" in err

    @impl(accepts=lambda x: "not today")
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise AssertionError("declined")

    described = backend(families=("acme_other",), layouts=("acme.tiles",), summary="made up")
    with family_module("acme_other", rms_norm), installed_backends(described):
        assert "made up; 1 ops here; weight layouts acme.tiles" in run("doctor")[1]
        assert "rms_norm               reference (acme declines: not today)" in run("doctor")[1]


@pytest.mark.parametrize(
    ("predicate", "message"),
    [
        (lambda x: True, "acme: the predicate of rms_norm returned True, expected None or a reason in words"),
        (lambda x: " ", "acme: the predicate of rms_norm returned ' ', expected None or a reason in words"),
        (lambda x: 1 / 0, "acme: the predicate of rms_norm raised ZeroDivisionError: division by zero; expected None or a reason"),
    ],
)
def test_a_faulty_predicate_is_told_by_name(predicate: Callable[..., Any], message: str, run: Run) -> None:
    @impl(accepts=predicate)
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise AssertionError("declined")

    with family_module("acme_cli", rms_norm), installed_backends(backend()):
        code, out, _ = run("doctor")
        assert code == 1 and message in out and "silu_and_mul" in out, "the other ops are told of all the same"
        code, _, err = run("explain", "rms_norm")
        assert code == 1 and message in err
        with pytest.raises(BackendError, match="the predicate of rms_norm"):
            q_core.explain("rms_norm")


def test_a_conflict_is_found(run: Run) -> None:
    def family(name: str) -> contextlib.AbstractContextManager[str]:
        @impl
        def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            raise AssertionError("not called")

        return family_module(name, rms_norm)

    with family("acme_cli"), family("apex_cli"), installed_backends(backend(), backend("apex", families=("apex_cli",))):
        code, out, _ = run("doctor")
        assert code == 1 and "backends 'acme' and 'apex' both have priority 200" in out
        assert "backends 'acme' and 'apex'" in json.loads(run("doctor", "--json")[1])["faults"]["rms_norm"]
        code, _, err = run("explain", "rms_norm")
        assert code == 1 and "both have priority 200; choose one with Q_BACKENDS" in err


@pytest.mark.usefixtures("acme")
def test_conformance_says_what_failed_and_how_to_mend_it(run: Run) -> None:
    code, out, _ = run("conformance", "--backend", "acme", "--op", "silu_and_mul", "--examples", "2")
    assert code == 1 and out.startswith("acme on cpu\n  silu_and_mul  failed")
    assert "\n\ntest_agreement: Results are the reference's" in out and "Mend: " in out
    said = json.loads(run("conformance", "--backend", "acme", "--op", "silu_and_mul", "--examples", "2", "--json")[1])
    assert said["ops"][0]["state"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "acne"), "backend 'acne' is not installed, expected one of: acme, reference"),
        (("--backend", "acme", "--op", "gemm"), "acme doesn't implement gemm, expected of: "),
        (("--backend", "acme", "--device", "meta"), "conformance: device is 'meta', expected one that acme serves: cpu"),
        (("--backend", "acme", "--device", "blah"), "conformance: device is 'blah', expected one that torch can use here"),
        (("--backend", "acme", "--examples", "0"), "argument --examples: 0 is not at least 1"),
    ],
)
@pytest.mark.usefixtures("acme")
def test_conformance_refuses_what_means_nothing(arguments: tuple[str, ...], message: str, run: Run) -> None:
    code, _, err = run("conformance", *arguments)
    assert code == 2 and message in err and "Traceback" not in err


def test_conformance_is_on_the_device_that_the_backend_serves(run: Run) -> None:
    with family_module("acme_cli"), installed_backends(backend(device_types=("meta",))):
        assert run("conformance", "--backend", "acme")[1].startswith("acme on meta\n")


def test_a_probe_that_says_something_else_is_refused(run: Run) -> None:
    with family_module("acme_cli"), installed_backends(backend(probe=lambda: True)):
        code, out, _ = run("doctor")
    assert code == 1 and "refused, its probe gives True, expected a q_core.backend.Availability" in out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_types": "cpu"}, "device_types 'cpu', expected a tuple of strings"),
        ({"families": "acme.norm"}, "families 'acme.norm', expected a tuple of strings"),
        ({"layouts": "acme.tiles"}, "layouts 'acme.tiles', expected a tuple of strings"),
        ({"device_types": ()}, r"no device_types, expected some, such as \('cpu',\), or None for all"),
    ],
)
def test_a_description_that_would_half_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=f"backend 'acme' has {message}"):
        backend(**settings)
