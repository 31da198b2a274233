"""Files that are replaced together: a process is killed before each of its system calls, and whoever reads finds one whole set."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from q_nn import atomic
from q_nn.atomic import new_directory, replacing, write_files
from q_nn.shards import is_model_file

CALLS = ("replace", "symlink", "link", "fsync", "unlink", "rmdir", "mkdir")
"""What changes a directory, or waits for it to be on disk; Path's methods call these."""

Files = dict[str, bytes]
OLD: Files = {"config.json": b"old", "model.safetensors": b"old", "generation_config.json": b"old"}
NEW: Files = {
    "config.json": b"new",
    "model-00001-of-00002.safetensors": b"new 1",
    "model-00002-of-00002.safetensors": b"new 2",
    "model.safetensors.index.json": b"new",
}
OTHERS: Files = {"tokenizer.json": b"words", "model-card.md": b"about"}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power fails here; what is counted is that it's called."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def put(directory: Path, files: Files) -> None:
    with replacing(directory, is_model_file, entry="config.json") as stage:
        for name, content in files.items():
            (stage / name).write_bytes(content)


def visible(directory: Path) -> Files:
    """What a reader finds: links are followed, and those that lead nowhere are no files."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and not path.name.startswith(".")}


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_before(call: int, act: Callable[[], None], patch: pytest.MonkeyPatch) -> bool:
    """Run ``act`` until its call number ``call``, from which on nothing happens any more; whether it came so far."""
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **settings: Any) -> Any:
            nonlocal count
            if count >= call:  # what cleans up can do nothing either
                raise Killed
            count += 1
            return original(*arguments, **settings)

        return run

    with patch.context() as patched:
        for name in CALLS:
            patched.setattr(os, name, counted(getattr(os, name)))
        try:
            act()
        except Killed:
            return True
    return False


@pytest.mark.parametrize(("old", "new"), [(OLD, NEW), (NEW, OLD), ({}, NEW)])
def test_killed_before_each_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: Files, new: Files) -> None:
    seen = []
    for call in range(1000):
        directory = tmp_path / str(call)
        put(directory, old)
        for name, content in OTHERS.items():
            (directory / name).write_bytes(content)
        killed = killed_before(call, lambda directory=directory: put(directory, new), monkeypatch)  # type: ignore[misc]
        found = visible(directory)
        assert found in (old | OTHERS, new | OTHERS)
        seen.append(found == new | OTHERS)
        # Neither the links nor what they lead through hinder the next, or are left after it.
        put(directory, {"config.json": b"next"})
        assert visible(directory) == {"config.json": b"next"} | OTHERS
        assert {path.name for path in directory.iterdir()} == {"config.json"} | set(OTHERS)
        assert not any(path.is_symlink() for path in directory.iterdir())
        if not killed:
            break
    assert call > 10
    assert seen == sorted(seen), "new files were there, and then old ones again"
    assert seen[-1]


@pytest.mark.parametrize("failing", ["replace", "symlink", "link", "fsync"])
def test_failures_before_the_switch_leave_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """A call that fails is an error, or done in another way; it never leaves half of a set."""
    for call in range(100):
        directory = tmp_path / str(call)
        put(directory, OLD)
        count = 0
        original = getattr(os, failing)

        def run(*arguments: Any, **settings: Any) -> Any:
            nonlocal count
            count += 1
            if count == call + 1:  # noqa: B023  (it is undone before the next)
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*arguments, **settings)  # noqa: B023

        with monkeypatch.context() as patched:
            patched.setattr(os, failing, run)
            try:
                put(directory, NEW)
                failed = False
            except OSError:
                failed = True
        assert visible(directory) in ((OLD, NEW) if failed else (NEW,))
        put(directory, OLD)
        assert visible(directory) == OLD
        if count <= call:
            break
    assert not failed
    assert call > 0


def test_without_links_half_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **settings: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)
    for call in range(1000):
        directory = tmp_path / str(call)
        put(directory, OLD)
        assert visible(directory) == OLD
        killed = killed_before(call, lambda directory=directory: put(directory, NEW), monkeypatch)  # type: ignore[misc]
        found = visible(directory)
        assert found in (OLD, NEW) or "config.json" not in found
        put(directory, NEW)
        assert visible(directory) == NEW
        if not killed:
            break


def test_a_copy_where_hard_links_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, OLD)

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    put(tmp_path, NEW)
    assert visible(tmp_path) == NEW


def test_an_error_in_the_body_changes_nothing(tmp_path: Path) -> None:
    put(tmp_path, OLD)
    with pytest.raises(FileNotFoundError), replacing(tmp_path, is_model_file, entry="config.json") as stage:  # noqa: PT012
        (stage / "config.json").write_bytes(b"half")
        (stage / "not there").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == OLD


def test_links_to_files_elsewhere_are_replaced_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"shared")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to("../blob")
    put(tmp_path / "model", NEW)
    assert visible(tmp_path / "model") == NEW
    assert (tmp_path / "blob").read_bytes() == b"shared"


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for directory in (Path(), Path("deep", "er")):
        put(directory, OLD)
        put(directory, NEW)
        assert visible(directory) == NEW
        assert not any(path.is_symlink() for path in directory.iterdir())
    (tmp_path / "link").symlink_to("deep/er")
    put(tmp_path / "link", OLD)
    assert visible(Path("deep", "er")) == OLD


def test_two_processes_wait_for_each_other(tmp_path: Path) -> None:
    put(tmp_path, OLD)
    children = []
    for number in range(4):
        child = os.fork()
        if not child:
            for _ in range(10):
                put(tmp_path, dict.fromkeys(NEW, b"%d" % number))
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert len(set(visible(tmp_path).values())) == 1
    assert set(os.listdir(tmp_path)) == set(NEW)


def test_write_files(tmp_path: Path) -> None:
    def writer(content: bytes) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            path.write_bytes(content)

        return write

    write_files(tmp_path / "new", {"a": writer(b"1"), "b": writer(b"2")})
    assert visible(tmp_path / "new") == {"a": b"1", "b": b"2"}
    assert (tmp_path / "new" / "a").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_new_directory_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(path: Path) -> None:
        with new_directory(path) as stage:
            for name, content in NEW.items():
                (stage / name).write_bytes(content)
            (stage / "sub").mkdir()
            (stage / "sub" / "file").write_bytes(b"deep")

    for call in range(100):
        path = tmp_path / str(call) / "out"
        killed = killed_before(call, lambda path=path: make(path), monkeypatch)  # type: ignore[misc]
        assert not path.exists() or visible(path) == NEW
        if not killed:
            break
    assert call > 5
    assert (path / "sub" / "file").read_bytes() == b"deep"
    assert os.listdir(path.parent) == ["out"]
    with pytest.raises(FileExistsError, match="new or empty"):
        make(path)
    with pytest.raises(RuntimeError), new_directory(tmp_path / "never"):
        raise RuntimeError
    assert not (tmp_path / "never").exists()
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    assert visible(tmp_path / "empty") == NEW
    assert atomic._PREFIX not in "".join(os.listdir(tmp_path))
