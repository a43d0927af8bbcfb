"""Batches that fit the memory there is, and going on when it runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherscope as fs
from fisherscope.errors import FisherscopeError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.limits import BatchLimits, Footprint, plan_batches
from fisherscope.instrument.memory import SavedBytes, parse_bytes, usable
from fisherscope.instrument.objectives import CAUSAL_LM
from fisherscope.instrument.options import CollectOptions
from tests import models

EXACT = (fs.Fisher(), fs.SampleGradients(parameters="all", dtype="float32"))


class Cramped:
    """A loss for which memory runs out with more than so many samples, in the backward pass of some layer."""

    def __init__(self, most: int, *, after: int = 0, calls: list[int] | None = None) -> None:
        self.most, self.after, self.calls = most, after, [] if calls is None else calls

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        found = CAUSAL_LM.losses(model, batch)
        if not torch.is_grad_enabled():
            return found  # there is no backward pass to run out of memory in
        self.calls.append(len(batch))
        if len(batch) > self.most and len(self.calls) > self.after:

            def fail(_gradient: Tensor) -> None:
                raise torch.OutOfMemoryError("out of memory, as a device says it")

            # half of the layers have handed on their gradients by then
            handle = model.model.layers[0].register_forward_hook(
                lambda *args: args[2].register_hook(fail) and None
            )
            found = CAUSAL_LM.losses(model, batch)
            handle.remove()
        return found


def collect(out: Path, rows: Any, **options: Any) -> fs.ContributionStore:
    model = models.build(models.named("llama"), layers=1)
    return fs.wrap(model, parameters="all").collect(
        {"a": rows, "b": rows[:3]}, out, extensions=EXACT, quiet=True, **options
    )


def same(one: fs.ContributionStore, other: fs.ContributionStore) -> None:
    for task in one.tasks:
        for name in one.parameters:
            for read in ("gradients", "fisher", "mean"):
                expected = getattr(one, read)(task, name)
                floor = 1e-6 * float(expected.abs().max())
                assert models.relative_error(getattr(other, read)(task, name), expected, floor=floor) <= 1e-5
        assert one.groups(task)["mean"].to_numpy() == pytest.approx(
            other.groups(task)["mean"].to_numpy(), rel=1e-4
        )


@pytest.mark.parametrize(("most", "after"), [(3, 0), (1, 0), (2, 5)])
def test_batches_are_halved_when_memory_runs_out(most: int, after: int, tmp_path: Path) -> None:
    """In the first batch or later: nothing is counted twice, nothing is lost, and it is said."""
    rows, loss = models.rows(11), Cramped(most, after=after)
    expected = collect(tmp_path / "whole.fs", rows, batch_size=4)
    with pytest.warns(
        UserWarning, match=r"memory ran out with \d samples of task 'a' at once: going on with \d"
    ):
        found = collect(tmp_path / "halved.fs", rows, batch_size=4, objective=loss)
    same(expected, found)
    assert max(loss.calls[-3:]) <= most


def test_a_sample_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """There is nothing left to halve."""
    with (
        pytest.warns(UserWarning, match="memory ran out"),
        pytest.raises(FisherscopeError, match=r"one sample: a_\d has \d+ positions"),
    ):
        collect(tmp_path / "run.fs", models.rows(4), batch_size=2, objective=Cramped(0, after=4))


def test_other_runtime_errors_pass_through(tmp_path: Path) -> None:
    """Only memory is a reason to halve."""

    def broken(model: nn.Module, batch: Batch) -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        collect(tmp_path / "run.fs", models.rows(4), batch_size=2, objective=broken)


def test_a_memory_budget_makes_smaller_batches_with_the_same_results(tmp_path: Path) -> None:
    """A budget for a few samples cuts the batches; the values are those of large ones."""
    model, rows = models.build(models.named("llama"), layers=1), models.rows(12)
    scope = fs.wrap(model, parameters="all")
    wide = scope._planner.plan({"a": rows}, CollectOptions(extensions=EXACT))
    budget = wide.estimate.memory_bytes // 4 + wide.estimate.accumulator_bytes
    expected = collect(tmp_path / "wide.fs", rows)
    found = collect(tmp_path / "narrow.fs", rows, memory_budget=budget)
    same(expected, found)
    limits = found.header.options
    assert limits["batch_rows"] < 12 or limits["batch_positions"] < wide.limits.positions
    resumed = collect(tmp_path / "narrow.fs", rows)
    assert resumed.header.options == limits


def test_a_budget_that_holds_no_accumulators_is_refused(tmp_path: Path) -> None:
    """The message says what else to do."""
    with pytest.raises(
        FisherscopeError, match=r"accumulators of the Fisher take [\d,]+ bytes, and 1,000 may"
    ):
        collect(tmp_path / "run.fs", models.rows(3), memory_budget="1KB")
    assert not (tmp_path / "run.fs").exists()


def test_amounts_of_memory() -> None:
    """Numbers, and texts with units."""
    assert parse_bytes("8GB") == 8 * 10**9
    assert parse_bytes("1.5 MiB") == 3 << 19
    assert parse_bytes(4096) == 4096
    for wrong in ("much", "8XB", -1, 0, 1.5, True):
        with pytest.raises(ValueError, match="amount of memory"):
            parse_bytes(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave batch_size at 'auto'"):
        CollectOptions(batch_size=3, memory_budget="1GB")
    assert 0 < usable(torch.device("cpu")) < 1 << 50


def test_what_the_graph_keeps_is_counted_once() -> None:
    """Weights are not counted, and a tensor that two operations keep counts once."""
    weight, given = torch.ones(50, 50, requires_grad=True), torch.ones(4, 50)
    saved = SavedBytes([weight])
    with saved.counted():
        out = (given @ weight).tanh()
        (out * out).sum()
    assert saved.total == 4 * (4 * 50 + 4 * 50)


def test_a_plan_takes_the_longest_first_and_stays_within_its_limits() -> None:
    """Whatever the lengths are, every row is in one batch, and none exceeds rows or positions."""
    lengths = [3, 9, 4, 7, 1, 30, 2, 2, 8]
    batches = plan_batches(lengths, BatchLimits(3, 20))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert batches[0] == (5,)
    for batch in batches:
        assert len(batch) <= 3
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 20
    footprint = Footprint(per_position=1000.0, per_row=5000.0, fixed=10_000)
    limits = footprint.limits(110_000, 10, torch.device("cpu"))
    assert footprint.of_batch(limits.rows, (limits.positions or 0) // limits.rows) <= 110_000
    with pytest.warns(UserWarning, match="one sample of 500 positions will take about"):
        assert footprint.limits(110_000, 500, torch.device("cpu")).positions == 500
