"""Gradients far below and above 1: squares that float32 cannot hold are right, or refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fisherscope as fs
from fisherscope.errors import Interrupted, NonFiniteError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.extensions.full_sums import FullSums
from fisherscope.instrument.objectives.base import Predictions
from fisherscope.instrument.objectives.causal_lm import causal_lm
from fisherscope.store import finalize, verify
from tests import models
from tests.instrument.test_resume import assert_identical, interrupt_at_batch

SETTING = models.named("qwen2")
SCALES = [1e-30, 1e-20, 1e-12, 1.0, 1e10, 1e15, 1e20]
DATA = models.rows(7)


def scaled_loss(model: nn.Module, batch: Batch, *, by: float) -> Tensor:
    """The sum of the token losses, times a number."""
    return causal_lm(model, batch).losses(len(batch)) * by


def scaled_predictions(model: nn.Module, batch: Batch, *, by: float) -> Predictions:
    """Predictions whose losses are scaled."""
    found = causal_lm(model, batch)
    return Scaled(found.logits, found.targets, found.sample, by)


@dataclass(frozen=True)
class Scaled(Predictions):
    """Losses times a number."""

    by: float = 1.0

    def unit_losses(self, targets: Tensor | None = None) -> Tensor:
        """Of each label."""
        return super().unit_losses(targets) * self.by


def growing_loss(model: nn.Module, batch: Batch, *, by: float) -> Tensor:
    """The longest sample, which is in the first batch, has a loss that is smaller by a factor."""
    losses = causal_lm(model, batch).losses(len(batch))
    is_longest = batch.attention_mask.sum(1) == 11
    return torch.where(is_longest, losses * by, losses)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """One model for all."""
    return models.build(SETTING, layers=1)


@pytest.fixture(scope="module")
def gradients() -> dict[str, Tensor]:
    """g_i of the unscaled losses by the loop in float64, ``[n, *shape]``."""
    wide = models.build(SETTING, layers=1).double()
    rows = models.loop(wide, DATA)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def collect(model: nn.Module, out: Path, scale: float, *extensions: Any, **options: Any) -> Any:
    """A store of the scaled losses."""
    predicts = any(isinstance(one, fs.ExactPerToken) for one in extensions)
    return fs.wrap(model).collect(
        {"a": DATA},
        out,
        extensions=extensions or ("fisher",),
        objective=partial(scaled_predictions if predicts else scaled_loss, by=scale),
        **({"batch_size": 2, "quiet": True} | options),
    )


def close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Finite, and within a tolerance of the largest entry."""
    found, expected = (
        torch.from_numpy(np.asarray(values).astype(np.float64)) for values in (found, expected)
    )
    assert torch.isfinite(found).all()
    largest = expected.abs().max()
    assert largest > 0
    assert float((found / largest - expected / largest).abs().max()) < tolerance


@pytest.mark.parametrize("scale", SCALES)
def test_everything_that_is_summed_equals_the_loop(
    scale: float, model: nn.Module, gradients: dict[str, Tensor], tmp_path: Path
) -> None:
    """F, mean h, group values and their moments, at any size of the losses, against the float64 loop."""
    store = collect(model, tmp_path / "a.fs", scale)
    normalised = np.array([models.tokens(row) for row in DATA]) ** -0.5
    values, table = store.group_values("a"), store.groups("a")
    theta = dict(model.named_parameters())
    for name in store.parameters:
        g = gradients[name] * scale
        h = g * torch.from_numpy(normalised).view(-1, *(1,) * (g.dim() - 1))
        close(store.fisher("a", name), h.square().mean(0))
        if float(h.mean(0).abs().max()) > 1e-4 * float(h.abs().max()):
            close(store.mean("a", name), h.mean(0), 1e-4)
        (place,) = np.flatnonzero((table["kind"] == "parameter") & (table["parameter"] == name))
        if float(g.abs().max()) > 1e-6 * scale:  # K's bias has rounding for a gradient
            close(values["square"].values[:, place], g.flatten(1).square().sum(1))
            close(table["sum"].iloc[place], h.flatten(1).square().sum(1).mean())
        dots = (g * theta[name].detach().double()).flatten(1).sum(1)
        size = g.flatten(1).norm(dim=1) * theta[name].detach().double().norm()
        found = torch.from_numpy(values["dot"].values.astype(np.float64))
        assert float(((found[:, place] - dots) / size).abs().max()) < 1e-4
    np.testing.assert_allclose(table["sum"], store.group_contributions("a").mean(0), rtol=1e-6)
    found = verify(tmp_path / "a.fs")
    assert found.ok, found.summary()


@pytest.mark.parametrize("encoding", ["dense", "factored", "lowrank", "groups"])
def test_a_factor_of_the_losses_is_squared(encoding: str, model: nn.Module, tmp_path: Path) -> None:
    """Losses times 1e-12 give F times 1e-24 to 1e-6, and contributions likewise, in every encoding."""
    kept = fs.SampleGradients(encoding=encoding, dtype="float32", parameters="all")
    one, small = (collect(model, tmp_path / f"{scale}.fs", scale, "fisher", kept) for scale in (1.0, 1e-12))
    for name in one.parameters:
        close(small.fisher("a", name).double() * 1e24, one.fisher("a", name), 1e-6)
        if encoding != "groups":
            tolerance = 1e-3 if encoding == "lowrank" else 1e-5
            close(small.gradients("a", name).double() * 1e12, one.gradients("a", name), tolerance)
    large = one.group_contributions("a")
    chosen = large > 1e-10 * large.max()
    close(small.group_contributions("a")[chosen] * 1e24 / large[chosen], np.ones(chosen.sum()), 1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_other_labels_and_factors_have_units_of_their_own(
    scale: float, model: nn.Module, tmp_path: Path
) -> None:
    """F of each token, group values alone, Kronecker factors: each is what it is at 1, times squares."""
    kinds = (fs.Fisher(shape="groups"), fs.ExactPerToken(), "kronecker")
    objective = partial(scaled_predictions, by=1.0)
    one, other = (
        fs.wrap(model).collect(
            {"a": DATA},
            tmp_path / f"{by}.fs",
            extensions=kinds,
            objective=partial(scaled_predictions, by=by) if by != 1 else objective,
            batch_size=3,
            quiet=True,
        )
        for by in (1.0, scale)
    )
    square = scale**2
    for name in one.parameters:
        fisher = one.fisher("a", name, labels="exact_per_token").double()
        close(other.fisher("a", name, labels="exact_per_token").double() / square, fisher)
    for labels in ("data", "exact_per_token"):
        before, after = (store.groups("a", labels=labels) for store in (one, other))
        for column in ("sum", "variance"):
            power = square if column == "sum" else square**2
            close(after[column] / power, before[column], 1e-4)
    module = "model.layers.0.self_attn.q_proj"
    first, second = one.kronecker("a", module), other.kronecker("a", module)
    close(second.S.double() / square, first.S)
    close(second.A, first.A)


def test_what_outgrows_its_scale_is_refused_by_name(model: nn.Module, tmp_path: Path) -> None:
    """A first batch of 1e-32 and then one of 1: one sum cannot hold both, and the error names a parameter."""
    rows = [models.rows(1, longest=11)[0], *models.rows(6, seed=3, longest=9)]
    with pytest.raises(NonFiniteError, match=r"squared gradients of \S*(weight|bias) overflows: .* task of"):
        fs.wrap(model).collect(
            {"a": rows},
            tmp_path / "a.fs",
            extensions=("fisher",),
            objective=partial(growing_loss, by=1e-32),
            batch_size=1,
            quiet=True,
        )


def test_one_quiet_sample_among_loud_ones_keeps_its_values(model: nn.Module, tmp_path: Path) -> None:
    """A sample with 1e-25 of the others' loss has its group values to rounding; F is that of the others."""
    rows = [models.rows(1, longest=11)[0], *models.rows(5, seed=3, longest=9)]
    stores = [
        fs.wrap(model).collect(
            {"a": rows},
            tmp_path / f"{by}.fs",
            extensions=("fisher",),
            objective=partial(growing_loss, by=by),
            batch_size=6,
            quiet=True,
        )
        for by in (1.0, 1e-25)
    ]
    one, quiet = (store.group_values("a") for store in stores)
    chosen = one["square"].values[0] > 1e-10 * one["square"].values[0].max()
    found = quiet["square"].values[0][chosen] / one["square"].values[0][chosen]
    np.testing.assert_allclose(found, 1e-50, rtol=1e-4)
    assert np.isfinite(quiet["dot"].values).all()
    np.testing.assert_allclose(quiet["square"].values[1:], one["square"].values[1:], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-22, 1.0, 1e19])
def test_ranks_and_batch_sizes_agree(scale: float, model: nn.Module, tmp_path: Path) -> None:
    """Two ranks that scale for themselves, another batch size, and merging: one sum, to rounding."""
    whole = collect(model, tmp_path / "whole.fs", scale, "fisher", "kronecker")
    other = collect(model, tmp_path / "other.fs", scale, "fisher", "kronecker", batch_size=4)
    out = tmp_path / "ranks.fs"
    for rank in range(2):
        collect(model, out, scale, "fisher", "kronecker", rank=rank, world_size=2)
    ranks = fs.open_store(out)
    names = [name for name in whole.parameters if not name.endswith("k_proj.bias")]
    for name in names:
        for store in (other, ranks):
            close(store.fisher("a", name), whole.fisher("a", name), 1e-6)
    before = {name: ranks.fisher("a", name) for name in names}
    factors = ranks.kronecker("a", "model.layers.0.mlp.up_proj")
    finalize(out)
    merged = fs.open_store(out)
    assert len(merged.task_index("a").snapshots) == 1
    assert all(torch.equal(merged.fisher("a", name), values) for name, values in before.items())
    assert torch.equal(merged.kronecker("a", "model.layers.0.mlp.up_proj").S, factors.S)
    more = [*DATA, *models.rows(3, seed=9)]
    grown = fs.wrap(model).collect(
        {"a": more},
        out,
        extensions=("fisher", "kronecker"),
        objective=partial(scaled_loss, by=scale),
        batch_size=2,
        quiet=True,
        world_size=1,
    )
    assert grown.fisher_count("a") == 10
    added = _fisher_of(model, more[7:], scale, tmp_path)
    for name in names:
        expected = whole.fisher("a", name).double() * 7 + added[name].double() * 3
        close(grown.fisher("a", name).double() * 10, expected, 1e-6)


def _fisher_of(model: nn.Module, rows: Any, scale: float, scratch: Path) -> dict[str, Tensor]:
    out = scratch / "more.fs"
    store = fs.wrap(model).collect(
        {"a": rows}, out, extensions=("fisher",), objective=partial(scaled_loss, by=scale), quiet=True
    )
    return {name: store.fisher("a", name) for name in store.parameters}


def test_what_float32_cannot_hold_is_said(model: nn.Module, tmp_path: Path) -> None:
    """Position contributions are squares in float32: too small ones are warned of, too large ones refused."""
    with pytest.warns(UserWarning, match=r"position contributions of \S*_proj.weight to a_\d+ add up to .e-"):
        collect(model, tmp_path / "small.fs", 1e-25, "fisher", "position_contributions")
    with pytest.raises(
        NonFiniteError, match=r"position contributions of \S*_proj.weight to a_\d+ .* float32"
    ):
        collect(model, tmp_path / "large.fs", 1e20, "fisher", "position_contributions")
    with pytest.warns(UserWarning, match=r"gradients with respect to \S+ are below 1e-35"):
        collect(model, tmp_path / "tiny.fs", 1e-37)


@pytest.mark.parametrize("scale", [1e-22, 1.0, 1e17])
def test_a_run_that_was_interrupted_is_bit_identical(
    scale: float, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units and what rounding took are kept in snapshots: F, mean and factors go on bit by bit."""
    kinds = ("fisher", fs.ExactPerToken(), "kronecker")
    whole = collect(model, tmp_path / "whole.fs", scale, *kinds, batch_size=1)
    with monkeypatch.context() as patch:
        interrupt_at_batch(patch, 3)
        with pytest.raises(Interrupted):
            collect(model, tmp_path / "again.fs", scale, *kinds, batch_size=1)
    again = collect(model, tmp_path / "again.fs", scale, *kinds, batch_size=1)
    assert_identical(again, whole)
    for name in whole.parameters:
        first, second = (store.fisher("a", name, labels="exact_per_token") for store in (whole, again))
        assert torch.equal(first, second)
    module = "model.layers.0.self_attn.o_proj"
    assert torch.equal(again.kronecker("a", module).S, whole.kronecker("a", module).S)


def test_halved_batches_sum_up_to_the_same(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that fails in the middle of its pass, after some sums have had it, is in no sum twice."""
    whole = collect(model, tmp_path / "whole.fs", 1e-21, batch_size=4)
    added = FullSums.added

    def short_of_memory(self: FullSums, emission: Any) -> None:
        added(self, emission)
        if len(emission.batch) == 4 and emission.parameter.endswith("q_proj.weight"):
            raise MemoryError

    monkeypatch.setattr(FullSums, "added", short_of_memory)
    with pytest.warns(UserWarning, match="memory ran out"):
        halved = collect(model, tmp_path / "halved.fs", 1e-21, batch_size=4)
    for name in whole.parameters:
        if not name.endswith("k_proj.bias"):
            close(halved.fisher("a", name), whole.fisher("a", name), 1e-6)
