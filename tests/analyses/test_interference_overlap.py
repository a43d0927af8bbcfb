"""Magnitude and overlap, and the test of overlap by label permutations, against slow loops and true nulls."""

import numpy as np
import pytest
import torch

from fisherscope.analyses import AnalyzeConfig, ConflictConfig, InterferenceConfig, run
from fisherscope.analyses.interference import OverlapTest, matrix
from fisherscope.analyses.slices import Loaded, SliceReader, find_block
from tests.analyses.synthetic import make_layout, make_task, write_store

PLACE = {"layer": 1, "block": "K", "head": 1}


def interference(store, seed=0, **options):
    config = AnalyzeConfig(
        interference=InterferenceConfig(**options),
        conflict=ConflictConfig(calibration_splits=0),
        seed=seed,
    )
    return run(store, ["interference"], config)["interference"]


def row_of(result, a, b, **place):
    frame = result.frame[(result.frame["task_a"] == a) & (result.frame["task_b"] == b)]
    for key, value in place.items():
        frame = frame[frame[key] == value]
    (row,) = frame.to_dict("records")
    return row


def operands(made, a, b, pooled):
    """C / (F + lam) and |g| of the slice, of the samples of both tasks."""
    piece = make_layout().slice(PLACE["layer"], PLACE["block"], PLACE["head"])
    h = {task: made.tasks[task].h(piece.parameter) for task in (a, b)}
    whole = torch.cat([h[a], h[b]]).square().mean(0) if pooled else h[a].square().mean(0)
    f = piece.take(whole).flatten() + 1e-6 * np.median(whole.numpy())
    left = {task: (piece.take(h[task]).flatten(1) ** 2 / f).numpy() for task in (a, b)}
    right = {
        task: piece.take(made.tasks[task].gradients[piece.parameter].double()).flatten(1).abs().numpy()
        for task in (a, b)
    }
    return left, right


def overlap_of(q, r):
    """One pair: rows that each add up to 1, times the number of entries."""
    return len(q) * float((q / q.sum() * (r / r.sum())).sum())


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
def test_magnitude_times_overlap_is_the_score(made, aggregate):
    """M_ij = |q_i|_1 |r_j|_1 / k x overlap_ij, over k once more for the mean; the table has their means."""
    left, right = operands(made, "math", "code", pooled=False)
    config = InterferenceConfig(aggregate=aggregate)
    scores = matrix(made.store, "math", "code", **PLACE, config=config).to_numpy()
    overlap = np.array([[overlap_of(q, r) for r in right["code"]] for q in left["math"]])
    magnitude = np.outer(left["math"].sum(1), right["code"].sum(1)) / left["math"].shape[1]
    magnitude /= left["math"].shape[1] if aggregate == "mean" else 1
    np.testing.assert_allclose(magnitude * overlap, scores, rtol=1e-5)
    row = row_of(interference(made.store, aggregate=aggregate), "math", "code", **PLACE)
    np.testing.assert_allclose(row["magnitude"], magnitude.mean(), rtol=1e-5)
    np.testing.assert_allclose(row["overlap"], overlap.mean(), rtol=1e-5)


def test_signed_forms_have_no_split(made):
    """Operands with signs have no magnitude to split off; those without do."""
    for form in ("natural", "symmetric"):
        assert interference(made.store, form=form).frame[["magnitude", "overlap"]].notna().to_numpy().all()
    for form in ("signed", "full"):
        assert interference(made.store, form=form).frame[["magnitude", "overlap"]].isna().to_numpy().all()


def slow_effect(overlap, labels):
    """Cross mean less the mean of the within means, pair by pair, a sample with itself left out."""
    groups = {(1, 0): [], (1, 1): [], (0, 0): [], (0, 1): []}
    for i, first in enumerate(labels):
        for j, second in enumerate(labels):
            if i != j:
                groups[first, second].append(overlap[i, j])
    within = (np.mean(groups[1, 1]) + np.mean(groups[0, 0])) / 2
    return np.mean(groups[1, 0]) - within, np.mean(groups[0, 1]) - within


def test_effect_and_p_equal_a_loop_over_pairs(made):
    """The statistic of every permutation, both orders of tasks, and p by counting; F is of all samples."""
    left, right = operands(made, "math", "code", pooled=True)
    q, r = (np.concatenate([side["math"], side["code"]]) for side in (left, right))
    overlap = np.array([[overlap_of(a, b) for b in r] for a in q])
    reader = SliceReader(made.store, 1 << 30)
    block = find_block(made.store, PLACE["layer"], PLACE["block"], "weight", "decoder")
    fisher = (12 * reader.fisher("math", block) + 9 * reader.fisher("code", block)) / 21
    test = OverlapTest(12, 9, 50, np.random.default_rng(0))
    loaded = Loaded(reader, block, PLACE["head"], {"math": 12, "code": 9})
    test.slice(loaded, "math", "code", fisher[PLACE["head"]], 1e-6 * float(np.median(fisher)))
    draws = np.array([slow_effect(overlap, labels.int().tolist()) for labels in test.labels])
    for found, statistic in zip(test.results(), draws.T, strict=True):
        np.testing.assert_allclose(found[0]["effect"], statistic[0], rtol=1e-4)
        z = np.abs(statistic - statistic.mean()) / statistic.std()
        assert found[0]["p"] == np.mean(z >= z[0] * (1 - 1e-9))
        assert found[0]["p_max"] == found[0]["p"]
    rows = [row_of(interference(made.store), *pair, **PLACE) for pair in (("math", "code"), ("code", "math"))]
    np.testing.assert_allclose([row["effect"] for row in rows], draws[0], rtol=1e-4)


def test_permutations_keep_the_numbers_and_are_shared():
    """Observed labels first; each draw labels as many samples; the seed decides."""
    first, again, other = (OverlapTest(5, 8, 20, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.labels[0].tolist() == [1] * 5 + [0] * 8
    assert (first.labels.sum(1) == 5).all()
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, other.labels)


def test_corrected_p_are_ordered(made):
    """p <= p_max, p <= q, of all 24 slices of an ordered pair; the same seed gives the same p."""
    frame = interference(made.store).frame
    assert ((frame["p"] > 0) & (frame["p"] <= frame["p_max"]) & (frame["p"] <= frame["q"])).all()
    assert (frame["q"] <= 1).all()
    again = interference(made.store).frame
    assert frame["p"].tolist() == again["p"].tolist()
    assert frame["p"].tolist() != interference(made.store, seed=1, permutations=99).frame["p"].tolist()


def split(task, n):
    """Two tasks out of the samples of one: exchangeable by construction."""
    order = list(range(task.n))
    return {"a": task.permuted(order[:n]), "b": task.permuted(order[n:])}


@pytest.mark.parametrize("splits", [12, pytest.param(24, marks=pytest.mark.slow)])
def test_level_where_tasks_are_exchangeable(splits, tmp_path):
    """Halves of one task, of unequal size: P(p <= .05) about .05, and p_max <= .05 in few of the splits."""
    layout = make_layout()
    p, any_called = [], 0
    for seed in range(splits):
        task = make_task(layout, "a", 17, 100 + seed)
        found = write_store(tmp_path / f"{seed}.fs", layout, split(task, 10))
        rows = interference(found.store, permutations=199).frame
        rows = rows[rows["task_a"] == "a"]
        p += rows["p"].tolist()
        any_called += int((rows["p_max"] <= 0.05).any())
    # slices of these tasks are independent: a binomial standard error of .009, or .013 of half as many
    assert 0.02 < np.mean(np.array(p) <= 0.05) < 0.08
    assert any_called <= splits * 5 / 24


def test_specialised_tasks_are_found_and_words_say_so(tmp_path):
    """Tasks that use other entries of one slice overlap less there (q < .05), and only there."""
    layout = make_layout()
    tasks = split(make_task(layout, "a", 30, 3), 15)
    piece = layout.slice(0, "V", 1)
    for task, half in ((tasks["a"], slice(0, 2)), (tasks["b"], slice(2, 4))):
        values = piece.take(task.gradients[piece.parameter])
        values[:, half] *= 0.05
    result = interference(write_store(tmp_path / "run.fs", layout, tasks).store)
    row = row_of(result, "a", "b", layer=0, block="V", head=1)
    assert row["effect"] < -0.3
    assert row["p_max"] < 0.05
    assert row["q"] < 0.05
    rest = result.frame[(result.frame["block"] != "V") & (result.frame["task_a"] == "a")]
    assert (rest["q"] > 0.05).all()
    assert "on 1 of 24 slices samples of both overlap less than samples within a task" in result.summary()


def test_sign_does_not_matter_to_overlap(tmp_path):
    """Opposed tasks overlap as agreeing ones do: the test is no test of conflict."""
    layout = make_layout()
    tasks = split(make_task(layout, "a", 16, 5), 8)
    against = {"a": tasks["a"], "b": tasks["b"].scaled(-1.0)}
    frames = [
        interference(write_store(tmp_path / f"{n}.fs", layout, made).store).frame
        for n, made in enumerate((tasks, against))
    ]
    np.testing.assert_allclose(frames[0]["effect"], frames[1]["effect"], rtol=1e-6)
    np.testing.assert_array_equal(frames[0]["p"], frames[1]["p"])


def test_samples_without_a_gradient_are_left_out(tmp_path):
    """A sample whose gradient is zero on a slice has no overlap there; the others are tested."""
    layout = make_layout()
    tasks = split(make_task(layout, "a", 14, 6), 7)
    piece = layout.slice(1, "Q", 2)
    piece.take(tasks["a"].gradients[piece.parameter])[3] = 0
    found = write_store(tmp_path / "run.fs", layout, tasks)
    row = row_of(interference(found.store), "a", "b", layer=1, block="Q", head=2)
    left = {name: piece.take(t.h(piece.parameter)).flatten(1) for name, t in tasks.items()}
    whole = torch.cat([t.h(piece.parameter) for t in tasks.values()]).square().mean(0)
    f = piece.take(whole).flatten() + 1e-6 * np.median(whole.numpy())
    kept = torch.cat([left["a"][[0, 1, 2, 4, 5, 6]], left["b"]])
    overlap = np.array([[overlap_of(q, r) for r in kept.abs().numpy()] for q in (kept**2 / f).numpy()])
    np.testing.assert_allclose(row["effect"], slow_effect(overlap, [1] * 6 + [0] * 7)[0], rtol=1e-4)


def test_test_can_be_left_out(made):
    """permutations=0: no p-values, and the summary claims nothing of them."""
    result = interference(made.store, permutations=0)
    assert result.frame[["effect", "p", "p_max", "q"]].isna().to_numpy().all()
    assert "q < .05" not in result.summary()


def test_one_task_alone_is_not_tested(made):
    """A task with itself has no labels to permute."""
    frame = interference(made.store, include_self=True).frame
    own = frame["task_a"] == frame["task_b"]
    assert frame.loc[own, "p"].isna().all()
    assert frame.loc[~own, "p"].notna().all()
