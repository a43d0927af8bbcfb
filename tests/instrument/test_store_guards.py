"""What surrounds the store of a collection: its disk, who may remove it, wrong input."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fisherscope as fs
from fisherscope.errors import StoreFullError, StoreLockedError
from fisherscope.instrument import guards
from fisherscope.instrument.options import CollectOptions
from fisherscope.store import StoreWriter
from tests import models

SETTING = next(s for s in models.SETTINGS if s.name == "qwen2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "0"}, "rank must be a whole number"),
        ({"rank": True}, "rank must be a whole number"),
        ({"rank": 1.0}, "rank must be a whole number"),
        ({"rank": 2, "world_size": 2}, "ranks are 0 to world_size - 1"),
        ({"rank": -1}, "ranks are 0 to world_size - 1"),
        ({"world_size": 0}, "ranks are 0 to world_size - 1"),
        ({"world_size": 2, "resume": False}, "resume=False with several ranks"),
        ({"max_samples": 2.5}, "max_samples must be a positive whole number"),
        ({"max_length": "3"}, "max_length must be a positive whole number"),
        ({"seed": "a"}, "seed must be a whole number"),
        ({"resume": "no"}, "resume must be True or False"),
    ],
)
def test_options_of_the_wrong_kind_are_named(options: dict[str, Any], message: str) -> None:
    """Before anything is loaded or written."""
    with pytest.raises(ValueError, match=message):
        CollectOptions(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"parameters": 5},
        {"parameters": []},
        {"parameters": [1]},
        {"encoding": "sparse"},
        {"dtype": "int8"},
        {"rank": 0},
        {"max_samples": 0},
    ],
)
def test_gradients_of_the_wrong_kind_are_named(options: dict[str, Any]) -> None:
    """The message shows what was given, and what may be."""
    with pytest.raises(ValueError, match=r"SampleGradients\(.*\): use"):
        fs.SampleGradients(**options)


def test_the_disk_is_compared_with_what_is_still_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that holds another task is no room for this one; one with half of it needs half."""
    scope, rows = fs.wrap(models.build(SETTING)), models.rows(16)
    out = tmp_path / "run.fs"
    scope.collect({"other": rows}, out, quiet=True)
    plan = scope.estimate({"a": rows}, measure=False)
    for free, fits in ((plan.disk_bytes - 1, False), (plan.disk_bytes, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if fits:
            guards.refuse_if_disk_is_small(plan, out)
        else:
            with pytest.raises(StoreFullError, match="bytes more"):
                guards.refuse_if_disk_is_small(plan, out)
    monkeypatch.undo()
    scope.collect({"other": rows, "a": rows[:8]}, out, quiet=True)
    half = plan.disk_bytes - 8 * plan.bytes_per_sample - plan.accumulator_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=half))
    guards.refuse_if_disk_is_small(plan, out)


def test_whoever_comes_second_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command started twice: the second is refused, and the first one's store stays."""
    scope, rows = fs.wrap(models.build(SETTING)), models.rows(4)
    out = tmp_path / "run.fs"
    held = []
    opened = StoreWriter.open.__func__  # type: ignore[attr-defined]

    def second(cls: type[StoreWriter], *args: Any, **options: Any) -> StoreWriter:
        held.append(opened(cls, *args, **options))  # the first, a moment before
        return opened(cls, *args, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(StoreWriter, "open", classmethod(second))
    with pytest.raises(StoreLockedError):
        scope.collect({"a": rows}, out, quiet=True)
    monkeypatch.undo()
    assert (out / "store.json").exists()
    held[0].close()
    assert scope.collect({"a": rows}, out, quiet=True).is_complete("a")


def test_a_run_that_fails_before_its_first_sample_leaves_nothing(tmp_path: Path) -> None:
    """Its directory can be used for the next attempt, whatever the options."""

    def broken(model: Any, batch: Any) -> Any:
        raise RuntimeError("no loss today")

    out = tmp_path / "run.fs"
    with pytest.raises(RuntimeError, match="no loss today"):
        fs.wrap(models.build(SETTING)).collect({"a": models.rows(4)}, out, objective=broken, quiet=True)
    assert not out.exists()
