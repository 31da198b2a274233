"""Names of kernels' arguments."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from q_triton import kernels

MODULES = [module.name for module in pkgutil.iter_modules(kernels.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_no_argument_is_named_as_what_triton_binds(name: str) -> None:
    """The function that Triton generates for a kernel's signature has variables of its own, which the interpreter doesn't show."""
    module = importlib.import_module(f"q_triton.kernels.{name}")
    functions = [value for value in vars(module).values() if hasattr(value, "arg_names")]
    assert functions
    for function in functions:
        assert not {"params", "specialization", "options"}.intersection(function.arg_names), function.__name__
