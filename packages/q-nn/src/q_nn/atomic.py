"""Files that are replaced together: all old or all new, at whatever moment the process is killed.

A rename switches one name, and a model is several. So for the moment of the switch the names are symbolic links through one link, ``now``,
and that one is switched::

    model.safetensors -> .replacing-x/now/model.safetensors        now -> old, then new

1. The new files are written into ``new`` and synced; the present ones get a second name in ``old``.
2. Each name becomes a link through ``now``, which is ``old``: nothing changes for who reads.
3. ``now`` becomes ``new``: everything changes at once.
4. Each name becomes the file itself again.

A process that is killed in between leaves links through which everybody reads one whole set; the next replacement clears them away.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = ".replacing-"


@contextmanager
def replacing(directory: Path, owned: Callable[[str], bool], *, entry: str) -> Iterator[Path]:
    """Replace those files of a directory that ``owned`` names by the ones that the body writes into the directory it is given.

    If the body raises, or anything fails before the switch, the old files are as they were. Other files are never touched. A second
    process that replaces files there waits for the first, where the file system has locks.

    Args:
        directory: made if it isn't there.
        owned: whether a name belongs to the set that is replaced.
        entry: the file without which nobody reads the others. On a file system without links it is removed first and put back last, so
            that there a process killed in between leaves no set rather than half of one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        for abandoned in list(directory.glob(f"{_PREFIX}*")):
            _settle(directory, abandoned)
        stage = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=directory))
        try:
            _make_readable(stage)
            old, new = stage / "old", stage / "new"
            old.mkdir()
            new.mkdir()
            yield new
            _sync_files(new)
            present = {path.name for path in directory.iterdir() if owned(path.name)}
            coming = {path.name for path in new.iterdir()}
            if _links_work(stage):
                _switch(directory, stage, present, coming)
            else:
                _replace_in_turn(directory, new, present, coming, entry)
        finally:
            _settle(directory, stage)


def write_files(directory: Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Write several files of a directory, and put them in place together.

    Args:
        directory: made if it isn't there.
        writers: what writes a file to the path it is given, by the file's name. The last is the ``entry`` of :func:`replacing`.
    """
    with replacing(directory, writers.__contains__, entry=list(writers)[-1]) as stage:
        for name, write in writers.items():
            write(stage / name)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Make a directory that is whole from the moment it is there, of what the body writes into the one it is given.

    A process that is killed leaves ``.<name>.*.partial`` beside it.

    Raises:
        FileExistsError: there is something already, other than an empty directory.
    """
    path = path.resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is there already, expected a new or empty directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        _make_readable(stage)
        yield stage
        _sync_files(stage)
        os.replace(stage, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _switch(directory: Path, stage: Path, present: set[str], coming: set[str]) -> None:
    now = stage / "now"
    for name in present:
        _second_name(directory / name, stage / "old" / name)
    _sync(stage / "old")
    _sync(stage)
    for name in present | coming:
        _link(stage, Path(stage.name, "now", name), directory / name)
    _sync(directory)
    _link(stage, Path("new"), now)
    _sync(stage)


def _second_name(path: Path, other: Path) -> None:
    real = os.path.realpath(path)
    if not os.path.exists(real):  # a link that leads nowhere
        return
    try:
        os.link(real, other)
    except OSError:  # on another file system, or on one without hard links
        shutil.copyfile(real, other)
        _sync(other)


def _link(stage: Path, target: Path, path: Path) -> None:
    """Make ``path`` a symbolic link, in the place of what is there."""
    os.symlink(target, stage / "link")
    os.replace(stage / "link", path)


def _replace_in_turn(directory: Path, new: Path, present: set[str], coming: set[str], entry: str) -> None:
    for name in sorted(present - coming | {entry}):
        (directory / name).unlink(missing_ok=True)
    _sync(directory)
    for name in sorted(coming, key=lambda name: name == entry):
        os.replace(new / name, directory / name)
    _sync(directory)


def _settle(directory: Path, stage: Path) -> None:
    """Put files in the place of the links that lead through ``stage``, and remove it."""
    for path in list(directory.iterdir()):
        if path.is_symlink() and Path(os.readlink(path)).parts[0] == stage.name:
            if path.exists():
                os.replace(path.resolve(), path)
            else:
                path.unlink()
    _sync(directory)
    shutil.rmtree(stage)


def _links_work(stage: Path) -> bool:
    try:
        _link(stage, Path("old"), stage / "now")
    except (OSError, NotImplementedError):
        return False
    return True


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Wait until no other process is here."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(ImportError, OSError):  # not every system and not every file system has these locks
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make_readable(directory: Path) -> None:
    """Give a temporary directory, which is the owner's alone, the rights of any new one."""
    mask = os.umask(0)
    os.umask(mask)
    directory.chmod(0o777 & ~mask)


def _sync_files(directory: Path) -> None:
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
