"""Which modules a pattern of names means, by the rule of transformers' quantizers."""

from __future__ import annotations

import re
from collections.abc import Iterable


def check_patterns(what: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """Refuse what is no list of regular expressions."""
    if isinstance(patterns, str) or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise TypeError(f"{what} is {patterns!r}, expected names or regular expressions, such as ('lm_head',)")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{what}: {pattern!r} is not a regular expression ({error})") from error
    return tuple(patterns)


def matching(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that means the module ``name``, if any.

    A pattern means a name if it is a suffix of it ("fc1" of "layers.2.fc1"), or matches it as a regular expression from its start up to
    a whole component ("layers.1" means "layers.1.fc1", not "layers.11.fc1").
    """
    for pattern in patterns:
        if name.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name):
            return pattern
    return None
