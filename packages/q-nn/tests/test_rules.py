"""QConfig and its rules: what they accept, what they mean, and how JSON holds them."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from q_nn import FourBit, Fp8Rows, Int8Rows, QConfig, QRule


@st.composite
def settings_of_formats(draw: st.DrawFn) -> dict[str, Any]:
    format = draw(st.sampled_from(["nf4", "fp4", "int4", "mxfp4", "nvfp4", "int8", "int8_weight_only", "fp8"]))
    settings: dict[str, Any] = {"format": format}
    if format in ("nf4", "fp4", "int4"):
        settings["blocksize"] = draw(st.sampled_from([None, 32, 64, 4096]))
        settings["double_quant"] = draw(st.sampled_from([None, True, False]))
    if format == "int8":
        settings["threshold"] = draw(st.one_of(st.none(), st.floats(0, 100)))
    return settings


@st.composite
def rules(draw: st.DrawFn) -> QRule:
    module_type = draw(st.sampled_from([None, "Linear", nn.Embedding]))
    patterns = st.sampled_from(["lm_head", r"layers\.\d+\.mlp", ".*experts"])
    pattern = draw(patterns if module_type is None else st.one_of(st.none(), patterns))
    return QRule(pattern, module_type=module_type, **draw(st.one_of(settings_of_formats(), st.just({"format": None}))))


@given(settings_of_formats(), st.lists(rules(), max_size=3), st.lists(st.sampled_from(["lm_head", "^a"])))
def test_json_there_and_back(settings: dict[str, Any], some_rules: list[QRule], skip: list[str]) -> None:
    config = QConfig(**settings, rules=tuple(some_rules), skip=tuple(skip))
    again = QConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_what_the_formats_are() -> None:
    expected = {
        QConfig(): FourBit("nf4", 64, 256),
        QConfig("fp4", blocksize=128, double_quant=False): FourBit("fp4", 128),
        QConfig("int4"): FourBit("int4", 64, 256),
        QConfig("mxfp4"): FourBit("mxfp4", 32),
        QConfig("nvfp4", blocksize=16): FourBit("nvfp4", 16),
        QConfig("int8"): Int8Rows(),
        QConfig("int8_weight_only"): Int8Rows(),
        QConfig("fp8"): Fp8Rows(),
    }
    for config, format in expected.items():
        assert config.weight_format() == format
    assert QRule("a").weight_format() is None
    assert QConfig("int8").default_rule.outlier_threshold() == 6.0
    assert QConfig("int8", threshold=0).default_rule.outlier_threshold() == 0


@pytest.mark.parametrize("make", [QConfig, lambda **settings: QRule("a", **settings)])
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"format": "int5"}, ValueError, "format is 'int5', expected one of"),
        ({"format": "nf4", "blocksize": 100}, ValueError, "blocksize is 100, expected one of"),
        ({"format": "nf4", "blocksize": 64.0}, ValueError, "blocksize is 64.0, expected one of"),
        ({"format": "mxfp4", "blocksize": 64}, ValueError, r"blocksize is 64, expected one of \(32,\) for 'mxfp4'"),
        ({"format": "int8", "blocksize": 64}, ValueError, "blocksize is for 4-bit formats, not for 'int8'"),
        ({"format": "nf4", "double_quant": 1}, TypeError, "double_quant is 1, expected True"),
        ({"format": "nvfp4", "double_quant": True}, ValueError, "scales of 'nvfp4' take one byte as they are"),
        ({"format": "fp8", "double_quant": False}, ValueError, "double_quant is for 4-bit formats, not for 'fp8'"),
        ({"format": "int8_weight_only", "threshold": 6.0}, ValueError, "threshold is for 'int8', not for 'int8_weight_only'"),
        ({"format": "int8", "threshold": -1}, ValueError, "threshold is -1, expected a number of 0 or more"),
        ({"format": "int8", "threshold": float("nan")}, ValueError, "threshold is nan"),
        ({"format": "int8", "bits": 8}, TypeError, "bits"),
    ],
)
def test_settings_are_checked(make: Any, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: QRule(format="nf4"), ValueError, "pattern and module_type are None"),
        (lambda: QRule("("), ValueError, "pattern: '\\(' is not a regular expression"),
        (lambda: QRule(module_type="a b"), TypeError, "module_type is 'a b', expected a class"),
        (lambda: QRule(module_type=int), TypeError, "module_type is <class 'int'>"),  # type: ignore[arg-type]
        (lambda: QConfig(None), ValueError, "format is None, expected a format"),  # type: ignore[arg-type]
        (lambda: QConfig(rules=[QRule("a")]), TypeError, "expected a tuple of QRule"),  # type: ignore[arg-type]
        (lambda: QConfig(rules=("a",)), TypeError, "expected a tuple of QRule"),  # type: ignore[arg-type]
        (lambda: QConfig.from_dict({"fromat": "nf4"}), ValueError, r"unknown keys \['fromat'\]"),
        (lambda: QConfig.from_dict([]), TypeError, "got list, expected an object"),  # type: ignore[arg-type]
        (lambda: QConfig.from_dict({"skip": "lm_head"}), TypeError, "skip is 'lm_head', expected a list"),
        (lambda: QConfig.from_dict({"rules": [{"pattern": "a"}]}), ValueError, "format is missing"),
        (lambda: QConfig.from_dict({"rules": [{"pattern": "a", "format": None, "x": 1}]}), ValueError, "unknown keys"),
        (lambda: QConfig.from_dict({"rules": ["a"]}), TypeError, "got str, expected an object"),
    ],
)
def test_rules_are_checked(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_what_a_rule_means() -> None:
    class Own(nn.Linear):
        pass

    linear, own, embedding = nn.Linear(2, 2), Own(2, 2), nn.Embedding(2, 2)
    assert QRule(module_type=nn.Linear) == QRule(module_type="Linear")
    assert QRule(module_type="Linear").means("a", linear)
    assert QRule(module_type="Linear").means("a", own)
    assert QRule(module_type="Own").means("a", own)
    assert not QRule(module_type="Own").means("a", linear)
    assert not QRule(module_type="Linear").means("a", embedding)
    both = QRule("layers.1", module_type="Linear")
    assert both.means("layers.1.fc", linear)
    assert not both.means("layers.11.fc", linear)
    assert not both.means("layers.1.fc", embedding)


def test_the_first_rule_counts_and_comes_before_skip() -> None:
    config = QConfig(skip=("a.b",), rules=(QRule("a.b", "int8"), QRule("b", "fp4"), QRule("c")))
    module = nn.Linear(2, 2)
    meant = [config.rule_for(name, module) for name in ("a.b", "x.b", "c", "d")]
    assert meant == [config.rules[0], config.rules[1], config.rules[2], None]
    assert config.skip_for("a.b.d") == "a.b"


def test_configurations_are_frozen_and_can_be_changed_in_a_copy() -> None:
    with pytest.raises(FrozenInstanceError):
        QConfig().format = "int8"  # type: ignore[misc]
    assert replace(QConfig(), format="mxfp4").weight_format() == FourBit("mxfp4", 32)
    assert {field.name for field in fields(QConfig)} >= {"format", "skip", "rules"}
    assert str(QRule("lm_head", module_type="Linear")) == "'lm_head' of type Linear"
