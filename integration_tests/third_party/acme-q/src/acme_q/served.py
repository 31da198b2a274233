"""How often each op was served in this process."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

calls: Counter[str] = Counter()
"""Calls by op."""

Function = TypeVar("Function", bound=Callable[..., Any])


def counted(function: Function) -> Function:
    """Count the calls of an implementation; its name and signature stay, by which the registry knows it."""

    @functools.wraps(function)
    def count(*arguments: Any) -> Any:
        calls[function.__name__] += 1
        return function(*arguments)

    return count  # type: ignore[return-value]  # the same signature, which a decorator can't say of any function
