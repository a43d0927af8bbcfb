"""Stores whose gradients are far from 1: the same analyses, in other units."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

import fisherscope as fs
from fisherscope.analyses import interference
from fisherscope.analyses.config import AnalyzeConfig, ConflictConfig, InterferenceConfig
from fisherscope.analyses.magnitude import unit_exponent
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.objectives.causal_lm import causal_lm
from tests import models
from tests.instrument.test_ranges import scaled_loss

SCALES = [1e-25, 1e18]
DATA = {"a": models.rows(9), "b": models.rows(9, seed=7)}


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Stores of the same data, by the scale of the losses."""
    scratch, model = tmp_path_factory.mktemp("ranges"), models.build(models.named("qwen2"))
    kept = fs.SampleGradients(dtype="float32")
    return {
        scale: fs.wrap(model).collect(
            DATA,
            scratch / f"{scale}.fs",
            extensions=("fisher", kept),
            objective=partial(scaled_loss, by=scale),
            batch_size=3,
            quiet=True,
        )
        for scale in (1.0, *SCALES)
    }


@pytest.fixture(scope="module")
def reports(collected: Any) -> Any:
    """All analyses of each store; what warns for one, warns for all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {scale: fs.analyze(store) for scale, store in collected.items()}


def numbers(frame: Any, columns: list[str]) -> Any:
    """Columns as one array."""
    return frame[columns].to_numpy(np.float64)


def compare(found: Any, expected: Any) -> None:
    """Equal to a small part of the largest, NaN where that is."""
    assert not np.isinf(found).any()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    largest = np.nanmax(np.abs(expected))
    assert largest > 0
    np.testing.assert_allclose(found / largest, expected / largest, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("scale", SCALES)
def test_the_unit_is_that_of_the_gradients(scale: float, collected: Any) -> None:
    """Usual gradients are left as they are; others come near 1."""
    assert unit_exponent(collected[1.0]) == 0
    exponent = unit_exponent(collected[scale])
    fisher = np.sqrt(max(float(collected[scale].fisher("a", n).max()) for n in collected[scale].parameters))
    assert 1e-3 < fisher * 2.0**exponent < 1e3


@pytest.mark.parametrize("scale", SCALES)
def test_importance_fisher_and_masks(scale: float, reports: Any) -> None:
    """Importance and F grow with the square, Taylor with the first power; masks are the same."""
    one, other = reports[1.0], reports[scale]
    for name in ("fisher", "importance"):
        before, after = one[name].frame, other[name].frame
        assert len(before) == len(after)
        for column in before.columns.intersection(after.columns):
            if before[column].dtype.kind != "f" or "rank" in column:
                continue
            values = after[column].to_numpy(np.float64)
            assert not np.isinf(values).any(), (name, column)
            assert np.array_equal(np.isnan(values), np.isnan(before[column])), (name, column)
            assert ((values == 0) <= (before[column] == 0)).all(), (name, column)
    before, after = one["fisher"].frame, other["fisher"].frame
    column = "mean" if "mean" in before.columns else "fisher"
    compare(after[column].to_numpy() / scale**2, before[column].to_numpy())
    kept = [report["masks"].frame for report in (one, other)]
    assert kept[0]["kept"].tolist() == kept[1]["kept"].tolist()


@pytest.mark.parametrize("scale", SCALES)
def test_conflict_and_overlap(scale: float, reports: Any) -> None:
    """Cosines of natural gradients and overlaps of masks have no unit."""
    one, other = reports[1.0], reports[scale]
    for name in ("conflict", "overlap"):
        assert type(one[name]) is type(other[name])
    levels = [report["conflict"].extra["levels"] for report in (one, other)]
    compare(numbers(levels[1], ["mean"]), numbers(levels[0], ["mean"]))
    assert not levels[1]["ridge"].isin([np.inf]).any()
    compare(levels[1]["ridge"].to_numpy() / scale**2, levels[0]["ridge"].to_numpy())


@pytest.mark.parametrize("scale", SCALES)
def test_interference_in_a_report(scale: float, reports: Any) -> None:
    """Scores grow with the gradients of the second task, F with their square."""
    before, after = (report["interference"].frame for report in (reports[1.0], reports[scale]))
    for column, power in (("mean", 1), ("max", 1), ("magnitude", 1), ("overlap", 0)):
        compare(after[column].to_numpy() / scale**power, before[column].to_numpy())
    for column in ("fisher_median", "fisher_max", "ridge"):
        compare(after[column].to_numpy() / scale**2, before[column].to_numpy())
    assert after["flat"].tolist() == before["flat"].tolist()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("form", ["unsigned", "natural", "signed", "symmetric", "full"])
def test_every_form(form: Any, scale: float, collected: Any) -> None:
    """A matrix, and a pair by itself: only the unsigned form has the unit of a gradient."""
    config = InterferenceConfig(form=form)
    power = scale if form == "unsigned" else 1.0
    found = []
    for store in (collected[1.0], collected[scale]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            matrix = interference.matrix(store, "a", "b", layer=0, block="V", head=0, config=config)
            single = interference.compute_sample_pair(store, "a", 1, "b", 2, 1, 1, config=config)
        found.append((matrix.values, np.array(list(single.values())), matrix.attrs["ridge"]))
    (matrix, single, lam), (others, other, damped) = found
    compare(others / power, matrix)
    compare(other / power, single)
    np.testing.assert_allclose(damped / scale**2, lam, rtol=1e-3)


def one_task_is_quiet(model: nn.Module, batch: Batch, *, by: float) -> Tensor:
    """Losses of task b times a number."""
    losses = causal_lm(model, batch).losses(len(batch))
    return losses * by if batch.task == "b" else losses


def test_tasks_of_very_different_size(tmp_path: Path) -> None:
    """Cosines and what divides by the loud task's F are right; of the other F it is said."""
    model, found = models.build(models.named("qwen2")), []
    for by in (1.0, 1e-22):
        store = fs.wrap(model).collect(
            DATA,
            tmp_path / f"{by}.fs",
            extensions=("fisher", fs.SampleGradients(dtype="float32")),
            objective=partial(one_task_is_quiet, by=by),
            batch_size=3,
            quiet=True,
        )
        config = AnalyzeConfig(conflict=ConflictConfig(metric="euclidean"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(fs.analyze(store, analyses=["conflict", "interference"], config=config))
        said = [str(one.message) for one in caught if "no damping in float32 suits both" in str(one.message)]
        assert bool(said) == (by != 1)
        assert all("self_attn" in text and "task 'b'" in text for text in said)
    levels = [report["conflict"].extra["levels"] for report in found]
    compare(numbers(levels[1], ["mean"]), numbers(levels[0], ["mean"]))
    before, after = (report["interference"].frame for report in found)
    chosen = before["task_a"] == "a"
    compare(after["mean"][chosen].to_numpy() * 1e22, before["mean"][chosen].to_numpy())
    assert not np.isinf(numbers(after, ["mean", "max", "min"])).any()
