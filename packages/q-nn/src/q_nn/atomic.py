"""Files that are old or new, never half."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path


def write_files(directory: Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Write several files of a directory, then put them all in place.

    Each writer writes to a path beside its target. Only when all of them are complete and on disk are they renamed, in order. If
    anything fails before, the old files are untouched and what was begun is removed; a killed process may leave ``.*.partial`` behind.

    Args:
        directory: exists.
        writers: what writes a file, by the file's name.
    """
    partial: dict[str, Path] = {}
    try:
        for name, write in writers.items():
            handle, path = tempfile.mkstemp(prefix=f".{name}.", suffix=".partial", dir=directory)
            os.close(handle)
            partial[name] = Path(path)
            write(partial[name])
            _make_readable(partial[name])
            _sync(partial[name])
        for name in writers:
            os.replace(partial[name], directory / name)
            del partial[name]
        _sync(directory)
    finally:
        for abandoned in partial.values():
            abandoned.unlink(missing_ok=True)


def _make_readable(path: Path) -> None:
    """Give a temporary file, which is the owner's alone, the rights of any new file."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
