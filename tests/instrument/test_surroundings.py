"""Options of other libraries, paths, stray files, missing terminals: the same run, or one sentence."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fisherscope as fs
from fisherscope.errors import StoreExistsError
from fisherscope.store.verifying import verify
from tests import models

TASKS = {"a": [[5, 6, 7], [8, 9, 3, 4]]}


@pytest.fixture(scope="module")
def scope() -> fs.Scope:
    return fs.wrap(models.build(next(s for s in models.SETTINGS if s.name == "qwen2")))


def test_numbers_of_numpy_are_the_same_options(scope: Any, tmp_path: Path) -> None:
    """A run with numpy's numbers, the class Fisher and torch's dtype is resumed with Python's own."""
    path = tmp_path / "run.fs"
    gradients = fs.SampleGradients(rank=np.int64(4), max_samples=np.int32(2))
    assert type(gradients.rank) is int
    scope.collect(
        TASKS,
        path,
        extensions=[fs.Fisher, gradients],
        batch_size=np.int64(2),
        max_length=np.int32(8),
        seed=np.int64(0),
        quiet=np.bool_(True),
        compute_dtype=torch.float32,
    )
    plain = ["fisher", fs.SampleGradients(rank=4, max_samples=2)]
    assert scope.collect(TASKS, path, extensions=plain, batch_size=2, max_length=8, quiet=True).n("a") == 2


@pytest.mark.parametrize("given", [None, 3, [object()], [torch.nn.Linear]])
def test_extensions_that_are_none(scope: Any, given: Any, tmp_path: Path) -> None:
    """One sentence says what is taken."""
    with pytest.raises(ValueError, match="extension"):
        scope.collect(TASKS, tmp_path / "run.fs", extensions=given, quiet=True)


class _Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("no reader")


def _closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, _Broken(), _closed()], ids=["none", "broken", "closed"])
def test_a_run_goes_on_without_stderr(
    scope: Any, stream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages fall silent, and the run ends well."""
    monkeypatch.setattr(sys, "stderr", stream)
    assert scope.collect(TASKS, tmp_path / "run.fs").n("a") == 2


def test_paths(scope: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """~ is the home directory; an empty path and a dangling link are named."""
    monkeypatch.setenv("HOME", str(tmp_path))
    scope.collect(TASKS, "~/run.fs", quiet=True)
    assert (tmp_path / "run.fs").is_dir()
    assert fs.open_store("~/run.fs").n("a") == 2
    with pytest.raises(ValueError, match="empty"):
        scope.collect(TASKS, "", quiet=True)
    (tmp_path / "link.fs").symlink_to("gone")
    with pytest.raises(StoreExistsError, match="link to gone"):
        scope.collect(TASKS, tmp_path / "link.fs", quiet=True)


def test_a_relative_path_stays_where_it_is(
    scope: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory may change while rows are read."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def rows() -> Any:
        for row in TASKS["a"]:
            monkeypatch.chdir(tmp_path / "elsewhere")
            yield row

    scope.collect({"a": rows()}, "run.fs", quiet=True)
    assert (tmp_path / "run.fs").is_dir()


def test_files_of_others_stay(scope: Any, tmp_path: Path) -> None:
    """Files of the system do not hinder creation; copies beside shards survive resuming and are noted."""
    path = tmp_path / "run.fs"
    path.mkdir()
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._x", ".nfs0001"):
        (path / name).write_bytes(b"x")
    scope.collect(TASKS, path, quiet=True)
    copies = ["r0000-000003 (conflicted copy).h5", "r0000-000001.h5~", "r0000-000001.sync-conflict-1.h5"]
    for name in copies:
        (path / "shards" / name).write_bytes(b"x")
    more = {"a": TASKS["a"], "b": TASKS["a"]}
    store = scope.collect(more, path, quiet=True)
    assert store.n("b") == 2
    assert {name for name in copies if (path / "shards" / name).exists()} == set(copies)
    found = verify(path)
    assert found.ok
    assert all(any(name in note for note in found.notes) for name in copies)


def test_ids_given_as_numbers(scope: Any, tmp_path: Path) -> None:
    """The message says how ids look."""
    store = scope.collect(TASKS, tmp_path / "run.fs", quiet=True)
    with pytest.raises(KeyError, match="a_3"):
        scope.gradients(store, [1])
