"""What every test of the repository starts from."""

import torch


def pytest_runtest_setup() -> None:
    """The same random numbers for a test, whichever tests ran before it."""
    torch.manual_seed(0)
