"""Usual settings of every optimizer rule: those of the ops, but for the learning rate and the step's number."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
    "adam": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
    "ademamix": {"beta1": 0.9, "beta2": 0.999, "beta3": 0.9999, "alpha": 5.0, "eps": 1e-8},
    "lion": {"beta1": 0.9, "beta2": 0.99},
    "sgd": {"beta1": 0.9},
    "rmsprop": {"beta2": 0.99, "eps": 1e-8},
    "adagrad": {"eps": 1e-10},
    "lamb": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
    "lars": {"beta1": 0.9, "trust_coefficient": 0.001, "eps": 1e-8},
}
