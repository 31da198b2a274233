"""What every test of the repository starts from."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """What only some sessions of noxfile.py ask for."""
    parser.addoption("--exhaustive", action="store_true", help="try every case where some stand for all: minutes, not seconds")


def pytest_runtest_setup() -> None:
    """The same random numbers for a test, whichever tests ran before it."""
    torch.manual_seed(0)
