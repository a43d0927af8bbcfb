"""When segments are sealed and snapshots taken."""

from __future__ import annotations

from pathlib import Path

import pytest

import fisherscope as fs
from fisherscope.instrument import cadence, collection
from fisherscope.instrument.cadence import Cadence, Pace
from tests import models

SETTING = next(s for s in models.SETTINGS if s.name == "qwen2")


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that the cadence looks at."""
    stopped = Clock()
    monkeypatch.setattr(cadence, "time", stopped)
    return stopped


def test_snapshots_take_a_tenth_of_the_bytes(clock: Clock) -> None:
    """Whatever is asked when, what was spent on snapshots stays below a tenth of the bytes of samples."""
    spacing, samples, snapshots = Cadence(0.1, 900.0, 100), 0, 0
    for _ in range(500):
        clock.now += 1
        samples += 30
        if spacing.is_due(samples + snapshots):
            snapshots += 100
            spacing.taken(0.01, 100)
        assert snapshots <= 0.1 * samples
    assert snapshots >= 0.09 * samples


def test_snapshots_take_a_tenth_of_the_time(clock: Clock) -> None:
    """A slow snapshot is followed by nine times its own time of work at the least."""
    spacing, working, spent = Cadence(0.1, 900.0, 1), 0.0, 0.0
    for _ in range(500):
        clock.now += 1
        working += 1
        if spacing.is_due(1 << 40):
            clock.now += 5
            spent += 5
            spacing.taken(5.0, 1)
    assert 5 <= spent <= 0.11 * working + 5


def test_no_more_than_a_quarter_of_an_hour_is_at_stake(clock: Clock) -> None:
    """Where a snapshot outweighs the samples it is taken all the same, after most_seconds."""
    spacing = Cadence(0.1, 900.0, 10**9)
    clock.now = 899
    assert not spacing.is_due(1000)
    clock.now = 900
    assert spacing.is_due(1000)
    spacing.taken(1.0, 10**9)
    clock.now = 1799
    assert not spacing.is_due(2000 + 10**9)
    clock.now = 1800
    assert spacing.is_due(2000 + 10**9)


def test_pace_is_the_mean_of_what_was_done() -> None:
    """Nothing is known before anything is done."""
    pace = Pace()
    assert pace.seconds(100) == 0
    pace.add(4, 2.0)
    pace.add(4, 6.0)
    assert pace.seconds(3) == 3.0


def _segments(out: Path, **options: object) -> list[int]:
    scope = fs.wrap(models.build(SETTING, layers=1))
    store = scope.collect({"a": models.rows(12)}, out, batch_size=2, quiet=True, **options)  # type: ignore[arg-type]
    return [len(segment.rows) for segment in store.ledgers[0].segments["a"].values()]


def test_small_runs_are_one_segment(tmp_path: Path) -> None:
    """A demo seals its samples at the end of the task."""
    assert _segments(tmp_path / "run.fs") == [12]


def test_segments_are_sealed_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment ends with the batch that makes it large enough."""
    plan = fs.wrap(models.build(SETTING, layers=1)).estimate({"a": models.rows(12)}, measure=False)
    monkeypatch.setattr(collection, "SEGMENT_BYTES", 3 * plan.bytes_per_sample)
    assert _segments(tmp_path / "run.fs") == [4, 4, 4]


def test_segments_are_sealed_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first segment is cut when its time is over; those behind it are planned by the pace so far."""
    monkeypatch.setattr(collection, "SEGMENT_SECONDS", 1e-9)
    assert _segments(tmp_path / "run.fs") == [2, 2, 2, 2, 2, 2]


def test_gradients_of_the_first_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``max_samples`` keeps gradients of so many rows; group values and F are of all."""
    scope = fs.wrap(models.build(SETTING, layers=1))
    rows = models.rows(12)
    some = scope.collect(
        {"a": rows}, tmp_path / "some.fs", batch_size=4, quiet=True,
        extensions=("fisher", fs.SampleGradients(max_samples=5)),
    )  # fmt: skip
    whole = scope.collect({"a": rows}, tmp_path / "whole.fs", batch_size=4, quiet=True)
    name = whole.gradient_parameters[0]
    assert some.gradients("a", name, slice(0, 5)).allclose(
        whole.gradients("a", name, slice(0, 5)), rtol=1e-2, atol=1e-5
    )
    with pytest.raises(fs.errors.NotStoredError, match="a_5"):
        some.gradients("a", name, [5])
    for encoding in ("dense", "factored"):
        kept = (fs.SampleGradients(max_samples=5, encoding=encoding),)
        store = scope.collect(
            {"a": rows}, tmp_path / f"{encoding}.fs", batch_size=4, quiet=True, extensions=kept
        )
        pieces = store.stream("a", name)
        taken, first = next(pieces)
        assert (taken, first.n) == (slice(0, 5), 5)
        with pytest.raises(fs.errors.NotStoredError, match="a_5"):
            next(pieces)
    assert some.group_values("a")["square"].shape == whole.group_values("a")["square"].shape
    assert some.fisher("a", name).allclose(whole.fisher("a", name), rtol=1e-4)
    estimated = scope.estimate(
        {"a": rows}, measure=False, extensions=("fisher", fs.SampleGradients(max_samples=5))
    )
    assert estimated.disk_bytes < scope.estimate({"a": rows}, measure=False).disk_bytes
