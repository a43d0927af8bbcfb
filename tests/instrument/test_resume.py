"""A collection that is killed or interrupted, and run again."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fisherscope as fs
from fisherscope.errors import FingerprintError, Interrupted, StoreExistsError
from tests import models
from tests.store.faults import fork, was_killed

SETTING = next(s for s in models.SETTINGS if s.name == "qwen2")


def _collect(out: Path) -> fs.ContributionStore:
    """What the child collects."""
    scope = fs.wrap(models.build(SETTING))
    return scope.collect({"a": models.rows(24), "b": models.rows(9, seed=5)}, out, batch_size=2, quiet=True)


def _slowly(out: Path) -> None:
    """The same, committed after every batch, which takes its time."""
    from fisherscope.instrument import collection

    run_batch = collection.Collection.run_batch

    def delayed(self: collection.Collection, *args: Any) -> None:
        time.sleep(0.05)
        run_batch(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collection, "SEGMENT_BYTES", 1)
        patch.setattr(collection.Collection, "run_batch", delayed)
        _collect(out)


def _wait_for_journal(out: Path, lines: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        journals = list(out.glob("journal/*.journal"))
        if journals and journals[0].read_bytes().count(b'"segment"') >= lines:
            return
        time.sleep(0.02)
    raise AssertionError("the child wrote nothing in two minutes")


def interrupt_at_batch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C while the batch of that number runs, counted from 1."""
    from fisherscope.instrument import collection

    run_batch, seen = collection.Collection.run_batch, []

    def interrupt(self: collection.Collection, *args: object) -> None:
        run_batch(self, *args)  # type: ignore[arg-type]
        seen.append(1)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(collection.Collection, "run_batch", interrupt)


def assert_identical(one: fs.ContributionStore, other: fs.ContributionStore) -> None:
    """Bit for bit: samples, gradients, group values, F and mean h."""
    assert one.tasks == other.tasks
    assert one.parameters == other.parameters
    for task in one.tasks:
        assert one.is_complete(task)
        assert other.is_complete(task)
        assert one.samples(task).equals(other.samples(task))
        assert one.group_values(task).identical(other.group_values(task))
        assert one.fisher_count(task) == other.fisher_count(task)
        for name in ("moments/mean", "moments/m2"):
            assert torch.equal(one.aggregate(task, name), other.aggregate(task, name))
        for name in one.gradient_parameters:
            assert torch.equal(one.gradients(task, name), other.gradients(task, name))
        for name in one.parameters:
            assert torch.equal(one.fisher(task, name), other.fisher(task, name))
            assert torch.equal(one.mean(task, name), other.mean(task, name))


def test_killed_and_run_again_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL half-way, twice; the same call then ends with the store of an uninterrupted run."""
    out = tmp_path / "killed.fs"
    for lines in (2, 5):
        child = fork(partial(_slowly, out))
        try:
            _wait_for_journal(out, lines)
        finally:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        assert was_killed(status)
    assert not fs.open_store(out).is_complete("b")
    monkeypatch.setattr("fisherscope.instrument.collection.SEGMENT_BYTES", 1)
    assert_identical(_collect(out), _collect(tmp_path / "whole.fs"))


def test_interrupt_seals_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C stops after the current batch, keeps what is done, restores the handlers, and resumes."""

    interrupt_at_batch(monkeypatch, 3)
    before = signal.getsignal(signal.SIGINT)
    out = tmp_path / "run.fs"
    with pytest.raises(Interrupted, match=r"3 of 12 batches of task 'a'") as caught:
        _collect(out)
    assert caught.value.signal == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
    assert fs.open_store(out).committed("a") == 6
    monkeypatch.undo()
    assert_identical(_collect(out), _collect(tmp_path / "whole.fs"))


def test_a_complete_store_is_reused_without_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call on a finished store runs no batch and changes no byte."""
    from fisherscope.instrument import collection

    out = tmp_path / "run.fs"
    _collect(out)
    files = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def never(*_: object) -> None:
        raise AssertionError("a batch was run again")

    monkeypatch.setattr(collection.Collection, "run_batch", never)
    _collect(out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == files


def test_another_run_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    """Other weights, other options and other samples are each named; nothing changes on the disk."""
    out = tmp_path / "run.fs"
    data = models.rows(4)
    fs.wrap(models.build(SETTING)).collect({"a": data}, out, quiet=True)
    files = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(FingerprintError, match="weights"):
        fs.wrap(models.build(SETTING, seed=3)).collect({"a": data}, out, quiet=True)
    with pytest.raises(FingerprintError, match="compute_dtype"):
        fs.wrap(models.build(SETTING)).collect({"a": data}, out, compute_dtype="float64", quiet=True)
    with pytest.raises(FingerprintError, match="'a'"):
        fs.wrap(models.build(SETTING)).collect({"a": models.rows(5, seed=9)}, out, quiet=True)
    with pytest.raises(StoreExistsError, match="resume"):
        fs.wrap(models.build(SETTING)).collect({"a": data}, out, resume=False, quiet=True)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == files


def test_a_task_is_added_to_a_store(tmp_path: Path) -> None:
    """A second task may come later; the first is not collected again."""
    out = tmp_path / "run.fs"
    a, b = models.rows(4), models.rows(5, seed=5)
    fs.wrap(models.build(SETTING)).collect({"a": a}, out, quiet=True)
    store = fs.wrap(models.build(SETTING)).collect({"a": a, "b": b}, out, quiet=True)
    assert store.tasks == ["a", "b"]
    assert [store.n(task) for task in store.tasks] == [4, 5]


def assert_equal_by_key(one: fs.ContributionStore, other: fs.ContributionStore, task: str) -> None:
    """The same content to rounding, whichever row a sample has."""
    assert one.is_complete(task)
    assert other.is_complete(task)
    left, right = one.samples(task), other.samples(task)
    place = {key: row for row, key in enumerate(right["key"])}
    order = [place[key] for key in left["key"]]
    assert len(left) == len(right) == len(set(order))
    torch.testing.assert_close(torch.tensor(left["loss"]), torch.tensor(right["loss"])[order])
    assert left["text"].tolist() == right["text"].iloc[order].tolist() if "text" in left else True
    for name in one.gradient_parameters:
        torch.testing.assert_close(
            one.gradients(task, name), other.gradients(task, name)[order], rtol=1e-2, atol=1e-5
        )
    for name in one.parameters:
        torch.testing.assert_close(one.fisher(task, name), other.fisher(task, name), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(one.mean(task, name), other.mean(task, name), rtol=1e-4, atol=1e-7)
    mean, expected = one.groups(task), other.groups(task)
    torch.testing.assert_close(torch.tensor(mean["mean"]), torch.tensor(expected["mean"]), rtol=1e-5, atol=0)
    assert one.fisher_count(task) == other.fisher_count(task) == len(left)


@pytest.mark.parametrize("size", [3, 8])
def test_another_batch_size_and_another_order_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Stopped after some batches, resumed with other batches and shuffled data: the same content."""
    from fisherscope.instrument import collection

    rows, out = models.rows(24), tmp_path / "run.fs"
    interrupt_at_batch(monkeypatch, 2)
    with pytest.raises(Interrupted):
        fs.wrap(models.build(SETTING)).collect({"a": rows}, out, batch_size=5, quiet=True)
    monkeypatch.undo()
    before = fs.open_store(out)
    assert 0 < before.committed("a") < 24
    shuffled = [rows[(7 * row + 3) % 24] for row in range(24)]
    sizes: list[int] = []
    run_rows = collection.Collection._run_rows

    def counted(self: collection.Collection, task: object, rows: list[int], *args: object) -> None:
        sizes.append(len(rows))
        run_rows(self, task, rows, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(collection.Collection, "_run_rows", counted)
    store = fs.wrap(models.build(SETTING)).collect({"a": shuffled}, out, batch_size=size, quiet=True)
    # planned batches stay, and run in parts where they are larger than asked for
    assert max(sizes) == min(size, 5)
    keys = before.samples("a")
    assert store.samples("a").loc[keys["row"], "key"].tolist() == keys["key"].tolist()
    whole = fs.wrap(models.build(SETTING)).collect({"a": rows}, tmp_path / "whole.fs", quiet=True)
    assert_equal_by_key(whole, store, "a")


def test_a_task_may_get_more_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New rows follow the old ones, which are not computed again; F covers all of them."""
    from fisherscope.instrument import collection

    rows, out = models.rows(14), tmp_path / "run.fs"
    scope = fs.wrap(models.build(SETTING))
    first = scope.collect({"a": rows[:9]}, out, batch_size=4, quiet=True)
    keys = first.samples("a")["key"].tolist()
    done: list[int] = []
    run_rows = collection.Collection._run_rows

    def counted(self: collection.Collection, task: object, rows: list[int], *args: object) -> None:
        done.extend(rows)
        run_rows(self, task, rows, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(collection.Collection, "_run_rows", counted)
    store = scope.collect({"a": rows[9:] + rows[:9]}, out, batch_size=4, quiet=True)
    assert sorted(done) == list(range(9, 14))
    assert store.samples("a")["key"].tolist()[:9] == keys
    assert_equal_by_key(scope.collect({"a": rows}, tmp_path / "whole.fs", quiet=True), store, "a")
    with pytest.raises(FingerprintError, match="5 of its 14 samples"):
        scope.collect({"a": rows[:9]}, out, batch_size=4, quiet=True)


@pytest.mark.parametrize("afterwards", [1, 3])
def test_ranks_share_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, afterwards: int) -> None:
    """Two ranks at once, one of them stopped; then another number of ranks finishes: the same content."""

    rows, out = models.rows(24), tmp_path / "run.fs"
    scope = fs.wrap(models.build(SETTING))
    scope.collect({"a": rows}, out, batch_size=3, rank=1, world_size=2, quiet=True)
    assert fs.open_store(out).committed("a") == 12
    interrupt_at_batch(monkeypatch, 2)
    with pytest.raises(Interrupted, match="2 of 4 batches"):
        scope.collect({"a": rows}, out, batch_size=3, rank=0, world_size=2, quiet=True)
    monkeypatch.undo()
    for rank in range(afterwards):
        store = scope.collect({"a": rows}, out, batch_size=3, rank=rank, world_size=afterwards, quiet=True)
    whole = scope.collect({"a": rows}, tmp_path / "whole.fs", batch_size=3, quiet=True)
    assert_equal_by_key(whole, store, "a")
    torch.testing.assert_close(
        whole.gradients("a", store.gradient_parameters[0]),
        store.gradients("a", store.gradient_parameters[0]),
        rtol=0,
        atol=0,
    )
    with pytest.raises(ValueError, match="rank=2 of world_size=2"):
        scope.collect({"a": rows}, out, rank=2, world_size=2)


def test_ranks_may_begin_together(tmp_path: Path) -> None:
    """Two processes create one store at the same moment, and a second process of a rank is refused."""
    out, scope = tmp_path / "run.fs", fs.wrap(models.build(SETTING))
    rows, options = {"a": models.rows(24)}, {"batch_size": 2, "quiet": True}
    children = [
        fork(lambda rank=rank: scope.collect(rows, out, rank=rank, world_size=2, **options))
        for rank in (0, 1)
    ]
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    store = fs.open_store(out)
    assert [ledger.rank for ledger in store.ledgers] == [0, 1]
    assert_equal_by_key(scope.collect(rows, tmp_path / "whole.fs", **options), store, "a")


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    """A directory that is no store is refused and not written to."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreExistsError, match=r"notes|not a"):
        fs.wrap(models.build(SETTING)).collect({"a": models.rows(3)}, tmp_path, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_header_is_json(tmp_path: Path) -> None:
    """store.json is plain JSON that names the format and its version."""
    store = fs.wrap(models.build(SETTING)).collect({"a": models.rows(3)}, tmp_path / "run.fs", quiet=True)
    header = json.loads((store.path / "store.json").read_text())
    assert header["format"] == "fisherscope-store"
    assert header["format_version"] == 1
