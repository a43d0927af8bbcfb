"""Natural-gradient cosines against naive computations."""

import numpy as np
import pandas as pd
import pytest
import torch

from fisherscope.analyses import AnalyzeConfig, ConflictConfig, run
from fisherscope.analyses.conflict import cosines, effect_size
from tests.analyses.synthetic import all_slices, make_task, slice_of, write_store


def conflict(store, memory_budget=1 << 30, **options):
    config = AnalyzeConfig(conflict=ConflictConfig(**options), memory_budget=memory_budget)
    return run(store, ["conflict"], config)["conflict"]


@pytest.fixture(scope="module")
def result(made):
    return conflict(made.store, min_effect_size=0.0, top_pairs=200)


def naive(made, layers=(0, 1), blocks="QKVO", heads=range(4)):
    """Natural gradients of both tasks over the chosen slices: unit rows, float64, one sample at a time."""
    rows = {"math": [], "code": []}
    for layer, block, head, parameter in all_slices(made.layout):
        if layer not in layers or block not in blocks or head not in heads:
            continue
        pooled = sum((made.tasks[t].h(parameter) ** 2).mean(0) for t in rows) / 2
        lam = 1e-6 * pooled.median()
        fisher = slice_of(made.layout, pooled[None], layer, block, head)[0]
        for task, parts in rows.items():
            h = slice_of(made.layout, made.tasks[task].h(parameter), layer, block, head)
            parts.append(h / (fisher + lam).sqrt())
    whole = {task: torch.cat(parts, 1) for task, parts in rows.items()}
    return [(u / u.norm(dim=1, keepdim=True)).numpy() for u in whole.values()]


@pytest.mark.parametrize("budget", [1 << 30, 1 << 16])
def test_whole_model_cosines_equal_a_naive_computation(made, budget):
    """Summed Grams of slices give the cosines of the concatenated natural gradients, streamed or not."""
    u, v = naive(made)
    found = conflict(made.store, memory_budget=budget).cosines("math", "code")
    np.testing.assert_allclose(found, u @ v.T, rtol=1e-5, atol=1e-6)
    assert found.coords["sample_a"].to_numpy()[3] == "math_3"


def test_streaming_in_stretches_of_samples_changes_nothing(made, result, monkeypatch):
    """Slices too large for the budget are read in stretches of samples, with the same Grams."""
    monkeypatch.setattr("fisherscope.analyses.slices._COPIES", 1 << 7)
    small = conflict(made.store, memory_budget=1 << 16, min_effect_size=0.0, top_pairs=200)
    np.testing.assert_allclose(
        small.cosines("math", "code"), result.cosines("math", "code"), rtol=1e-5, atol=1e-6
    )
    pd.testing.assert_frame_equal(small.extra["levels"], result.extra["levels"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("level", "place", "chosen"),
    [
        ("slice", {"layer": 1, "block": "K", "head": 1}, {"layers": (1,), "blocks": "K", "heads": (1,)}),
        ("block", {"layer": 0, "block": "O"}, {"layers": (0,), "blocks": "O"}),
        ("layer", {"layer": 1}, {"layers": (1,)}),
        ("whole", {}, {}),
    ],
)
def test_level_statistics_equal_naive_ones(made, result, level, place, chosen):
    """Mean, minimum, share below 0, and the within-task reference, at every level."""
    u, v = naive(made, **chosen)
    rows = result.extra["levels"]
    rows = rows[rows["level"] == level]
    for column, value in place.items():
        rows = rows[rows[column] == value]
    (row,) = rows.to_dict("records")
    cross = u @ v.T
    within = [(w @ w.T)[~np.eye(len(w), dtype=bool)].mean() for w in (u, v)]
    expected = [cross.mean(), cross.min(), (cross < 0).mean(), np.mean(within)]
    np.testing.assert_allclose(
        [row["mean"], row["min"], row["share_negative"], row["reference"]], expected, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(row["excess"], expected[0] - expected[3], rtol=1e-4, atol=1e-6)


def test_pairs_come_by_p_with_their_worst_slice(made, result):
    """Smallest p first; the slice of a pair that is called on none is where it is lowest; texts are there."""
    u, v = naive(made)
    cross = u @ v.T
    frame = result.frame
    assert frame["p"].is_monotonic_increasing
    assert len(frame) == cross.size
    i, j = (frame[f"sample_{side}"].str.rpartition("_")[2].astype(int) for side in "ab")
    np.testing.assert_allclose(frame["cosine"], cross[i, j], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(frame["effect_size"], np.sqrt((1 - frame["cosine"]) / 2))
    np.testing.assert_allclose(frame["excess"], frame["cosine"] - frame["reference"])
    places = [p[:3] for p in all_slices(made.layout)]
    units = [naive(made, (layer,), block, (head,)) for layer, block, head in places]
    slices = np.stack([a @ b.T for a, b in units])
    for k in (0, 1, 50, 107):
        row = frame.iloc[k]
        worst = slices[:, i[k], j[k]].argmin()
        assert (row["layer"], row["block"], row["head"]) == places[worst]
        np.testing.assert_allclose(row["slice_cosine"], slices[worst, i[k], j[k]], rtol=1e-4, atol=1e-6)
        assert row["text_a"] == f"math text {i[k]} <script>"


def test_effect_size_is_half_the_distance_of_unit_vectors():
    """d of orthogonal vectors is 0.71, of opposite ones 1, of equal ones 0."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    np.testing.assert_allclose(effect_size(a @ b), np.linalg.norm(a - b) / 2)
    np.testing.assert_allclose(effect_size([1, 0, -1]), [0, np.sqrt(0.5), 1])


def test_min_effect_size_filters_by_the_excess(made, result):
    """Only pairs at least so far below the within-task reference are reported."""
    level = float(-result.frame["excess"].median())
    found = conflict(made.store, min_effect_size=level, top_pairs=200).frame
    assert 0 < len(found) < len(result.frame)
    assert (found["excess"] <= -level).all()
    none = conflict(made.store, min_effect_size=3.0)
    assert none.frame.empty
    none.to_json()


def test_opposed_tasks_are_found(made, layout, tmp_path):
    """A task with the negated gradients of another has cosines below 0 and its twins at -1."""
    task = make_task(layout, "a", 8, 5)
    pair = write_store(tmp_path / "run.fs", layout, {"a": task, "b": task.scaled(-1.0)})
    result = conflict(pair.store)
    np.testing.assert_allclose(np.diag(result.cosines("a", "b")), -1, rtol=1e-5)
    best = result.frame.sort_values("cosine").head(8)
    assert (best["sample_a"].str.removeprefix("a") == best["sample_b"].str.removeprefix("b")).all()
    assert result.extra["levels"]["mean"].lt(0).all()


def test_scale_of_the_loss_does_not_matter(made, layout, tmp_path, result):
    """Gradients of both tasks times a constant give the same cosines (relative damping)."""
    scaled = {name: task.scaled(1000.0) for name, task in made.tasks.items()}
    other = conflict(write_store(tmp_path / "run.fs", layout, scaled).store)
    np.testing.assert_allclose(
        other.cosines("math", "code"), result.cosines("math", "code"), rtol=1e-3, atol=1e-5
    )


def test_order_of_samples_only_permutes(made, layout, tmp_path, result):
    """Shuffled samples give shuffled cosines and the same statistics."""
    order = [5, 2, 0, 11, 3, 1, 4, 6, 10, 9, 8, 7]
    tasks = {"math": made.tasks["math"].permuted(order), "code": made.tasks["code"]}
    other = conflict(write_store(tmp_path / "run.fs", layout, tasks).store)
    np.testing.assert_allclose(
        other.cosines("math", "code"), result.cosines("math", "code")[order], rtol=1e-4, atol=1e-6
    )


def test_both_orders_of_tasks_and_the_maps(result):
    """Cosines are symmetric: matrices transpose, maps are the same for both orders, NaN where no head is."""
    forth, back = result.cosines("math", "code"), result.cosines("code", "math")
    np.testing.assert_array_equal(forth, back.to_numpy().T)
    mean = result.data["mean"]
    xa, xb = (mean.sel(task_a=a, task_b=b) for a, b in (("math", "code"), ("code", "math")))
    np.testing.assert_array_equal(xa, xb)
    assert xa.sel(block="V", head=3).isnull().all()
    assert mean.sel(task_a="math", task_b="math").isnull().all()


def test_large_matrices_and_many_samples_are_limited_and_said(made):
    """Matrices over the limit are not kept; a limit of samples takes the first and warns."""
    result = conflict(made.store, matrix_limit=10)
    with pytest.raises(KeyError, match="matrix_limit"):
        result.cosines("math", "code")
    first = conflict(made.store, max_samples_per_task=5)
    assert first.cosines("math", "code").shape == (5, 5)
    assert any("first 5 of the 12 samples of 'math'; F uses all" in note for note in first.warnings)
    np.testing.assert_allclose(
        first.cosines("math", "code"),
        conflict(made.store).cosines("math", "code")[:5, :5],
        rtol=1e-5,
        atol=1e-6,
    )


def test_fisher_from_gradients_where_full_shape_is_absent(lean, result):
    """F of a slice then is the mean over the stored gradients; the result says which it was."""
    other = conflict(lean.store)
    assert (result.config["fisher_source"], other.config["fisher_source"]) == ("full", "gradients")
    np.testing.assert_allclose(
        other.cosines("math", "code"), result.cosines("math", "code"), rtol=1e-4, atol=1e-6
    )


def test_a_slice_without_gradient_has_no_cosines_and_is_flagged(made, layout, tmp_path):
    """F = 0 gives no number, no warning from numpy, and a flag; a sample without gradient likewise."""
    tasks = {name: task.scaled(1.0) for name, task in made.tasks.items()}
    for task in tasks.values():
        task.gradients["layers.0.attn.k.weight"][:] = 0
        for gradient in task.gradients.values():
            gradient[2] = 0
    result = conflict(write_store(tmp_path / "run.fs", layout, tasks).store)
    levels = result.extra["levels"]
    flat = levels[(levels["level"] == "slice") & levels["flat"].eq(True)]
    assert set(zip(flat["layer"], flat["block"], strict=True)) == {(0, "K")}
    assert flat["mean"].isna().all()
    assert flat["undefined"].eq(1).all()
    assert any("2 of 24 slices have F = 0" in note for note in result.warnings)
    whole = levels[levels["level"] == "whole"].iloc[0]
    np.testing.assert_allclose(whole["undefined"], 1 - 11 * 8 / (12 * 9))
    assert np.isfinite(whole["mean"])


def test_single_samples_have_no_reference(layout, tmp_path):
    """One sample per task: cosines are reported, the excess is undefined and filters nothing."""
    tasks = {name: make_task(layout, name, 1, seed) for seed, name in enumerate("ab")}
    result = conflict(write_store(tmp_path / "run.fs", layout, tasks).store, min_effect_size=0.5)
    assert len(result.frame) == 1
    assert result.frame["excess"].isna().all()


def test_cosines_of_zero_vectors_are_undefined():
    """A zero vector has no direction."""
    gram = np.array([[1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(cosines(gram), [[1, np.nan], [np.nan, np.nan]])
