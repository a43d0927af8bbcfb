"""Chosen pairs of samples, heat maps over query heads, and tasks of which something is missing."""

import json

import numpy as np
import pytest

import fisherscope as fs
from fisherscope.analyses import AnalyzeConfig, ConflictConfig, InterferenceConfig, run
from fisherscope.analyses.interference import compute_heatmap, compute_sample_pair, matrix
from tests import models
from tests.analyses.synthetic import write_store

FORMS = ["unsigned", "natural", "signed", "symmetric", "full"]
pytestmark = pytest.mark.filterwarnings("ignore:.*smallest non-zero eigenvalue")
KV = {"K", "V"}


def interference(store, tasks=None, **options):
    config = AnalyzeConfig(
        interference=InterferenceConfig(**options),
        conflict=ConflictConfig(calibration_splits=0),
        tasks=tasks,
    )
    return run(store, ["interference"], config)["interference"]


def head_of(block, query):
    """Four query heads, two kv heads."""
    return query // 2 if block in KV else query


def scores(store, a, b, layer, block, head, config, **options):
    return matrix(store, a, b, layer=layer, block=block, head=head, config=config, **options).to_numpy()


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_is_an_entry_of_the_matrices(made, form):
    """Q and O of the query head, K and V of its kv head; the full form leaves the pair out of F."""
    config = InterferenceConfig(form=form)
    out = {"leave_pair_out": True} if form == "full" else {}
    found = compute_sample_pair(made.store, "code", 2, "math", 11, 0, 3, config=config)
    assert list(found) == ["Q", "K", "V", "O"]
    for block, score in found.items():
        expected = scores(made.store, "code", "math", 0, block, head_of(block, 3), config, **out)
        np.testing.assert_allclose(score, expected[2, 11], rtol=1e-4)
    own = compute_sample_pair(made.store, "math", 2, "math", 11, 0, 3, config=config)
    expected = scores(made.store, "math", "math", 0, "K", 1, config, **out)
    np.testing.assert_allclose(own["K"], expected[2, 11], rtol=1e-4)


def test_pairs_that_are_not_there_are_named(made):
    """A row, a head, a layer, a task that does not exist, and a sample with itself."""
    with pytest.raises(IndexError, match="'math' has 12 samples"):
        compute_sample_pair(made.store, "math", 12, "code", 0, 0, 0)
    with pytest.raises(IndexError, match="asked for row -1"):
        compute_sample_pair(made.store, "math", 0, "code", -1, 0, 0)
    with pytest.raises(IndexError, match="4 query heads, asked for 4"):
        compute_sample_pair(made.store, "math", 0, "code", 0, 0, 4)
    with pytest.raises(KeyError, match="9"):
        compute_sample_pair(made.store, "math", 0, "code", 0, 9, 0)
    with pytest.raises(KeyError, match="maht"):
        compute_sample_pair(made.store, "maht", 0, "code", 0, 0, 0)
    with pytest.raises(ValueError, match="does not interfere with itself"):
        compute_sample_pair(made.store, "math", 3, "math", 3, 0, 0)
    with pytest.raises(ValueError, match="leave_pair_out is for the form 'full'"):
        matrix(made.store, "math", "code", layer=0, block="Q", head=0, leave_pair_out=True)


def test_an_unknown_task_is_an_error(made):
    """In an analysis, a matrix and a heat map: an error that names it."""
    with pytest.raises(ValueError, match="no task 'maht': it has math, code"):
        interference(made.store, tasks=("math", "maht"))
    with pytest.raises(KeyError, match="maht"):
        matrix(made.store, "math", "maht", layer=0, block="Q", head=0)
    with pytest.raises(KeyError, match="maht"):
        compute_heatmap(made.store, "maht", "code")


@pytest.mark.parametrize("form", FORMS)
def test_heatmap_equals_the_matrices(made, form):
    """Means per layer and query head, K and V repeated, and the best pairs of each block."""
    config = InterferenceConfig(form=form, top_pairs=7)
    found = compute_heatmap(made.store, "math", "code", config=config)
    assert list(found) == ["Q", "K", "V", "O"]
    for block, part in found.items():
        average = part["layer_head_avg"]
        assert (average.dims, average.shape) == (("layer", "head"), (2, 4))
        assert average.attrs["form"] == form
        assert "repeat" in average.attrs["note"]
        everything = []
        for layer in (0, 1):
            for query in range(4):
                place = (layer, block, head_of(block, query))
                values = scores(made.store, "math", "code", *place, config)
                np.testing.assert_allclose(
                    average.sel(layer=layer, head=query),
                    values.mean(),
                    rtol=1e-4,
                    atol=1e-6 * abs(values).max(),
                )
                if block not in KV or query % 2 == 0:
                    if form == "full":
                        values = scores(made.store, "math", "code", *place, config, leave_pair_out=True)
                    everything += [(s, i, j, layer, query) for (i, j), s in np.ndenumerate(values)]
        everything.sort(key=lambda one: one[0], reverse=form not in {"signed", "full"})
        top = part["top_conflicts"]
        np.testing.assert_allclose([t["score"] for t in top], [e[0] for e in everything[:7]], rtol=1e-4)
        keys = ("sample_i", "sample_j", "layer", "head")
        assert tuple(top[0][key] for key in keys) == everything[0][1:]
        if form in {"signed", "full"}:
            assert all(t["score"] < 0 for t in top)
        json.dumps(top)


def test_heatmap_of_chosen_layers_heads_and_samples(made):
    """Only what is asked for, in the order asked for; F stays that of all samples."""
    found = compute_heatmap(made.store, "math", "code", [1], [3, 0], 5)
    whole = compute_heatmap(made.store, "math", "code", config=InterferenceConfig(max_samples_per_task=5))
    for block, part in found.items():
        average = part["layer_head_avg"]
        assert average.coords["head"].values.tolist() == [3, 0]
        np.testing.assert_array_equal(
            average, whole[block]["layer_head_avg"].sel(layer=[1], head=[3, 0]), err_msg=block
        )
        assert {t["layer"] for t in part["top_conflicts"]} == {1}
        assert max(t["sample_i"] for t in part["top_conflicts"]) < 5
        pair = part["top_conflicts"][0]
        place = [pair[key] for key in ("layer", "head")]
        again = compute_sample_pair(made.store, "math", pair["sample_i"], "code", pair["sample_j"], *place)
        np.testing.assert_allclose(again[block], pair["score"], rtol=1e-5)
    with pytest.raises(IndexError, match="up to 4 query heads, asked for 4"):
        compute_heatmap(made.store, "math", "code", heads=[4])
    with pytest.raises(KeyError, match="7"):
        compute_heatmap(made.store, "math", "code", layers=[7])


def test_heatmap_of_a_task_with_itself(made):
    """No sample meets itself, neither in the means nor among the pairs."""
    found = compute_heatmap(made.store, "math", "math", config=InterferenceConfig(form="symmetric"))
    config = InterferenceConfig(form="symmetric")
    values = scores(made.store, "math", "math", 1, "O", 2, config)
    average = found["O"]["layer_head_avg"].sel(layer=1, head=2)
    np.testing.assert_allclose(average, np.nanmean(values), rtol=1e-5)
    assert all(t["sample_i"] != t["sample_j"] for t in found["O"]["top_conflicts"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", ["full", "groups"])
def test_a_task_without_gradients_gives_zeros_and_a_warning(made, layout, tmp_path, form, shape):
    """Its samples are there, their gradients are not: zeros, said aloud; the other tasks are scored."""
    tasks = {**made.tasks, "bare": made.tasks["math"].permuted([0, 1, 2])}
    found = write_store(tmp_path / "run.fs", layout, tasks, without=("bare",), fisher_shape=shape).store
    config = InterferenceConfig(form=form)
    result = interference(found, form=form)
    frame = result.frame
    touched = (frame["task_a"] == "bare") | (frame["task_b"] == "bare")
    assert (touched.sum(), len(frame)) == (4 * 24, 6 * 24)
    assert frame.loc[touched, ["mean", "min", "max", "sample_q95"]].eq(0).to_numpy().all()
    assert frame.loc[touched, ["p", "ridge"]].isna().to_numpy().all()
    assert not frame["flat"].any()
    assert frame.loc[~touched, "max"].gt(0).all()
    assert any("no gradients of the 3 samples of 'bare' are stored" in note for note in result.warnings)
    pairs = result.top(10_000)
    assert not ((pairs["task_a"] == "bare") | (pairs["task_b"] == "bare")).any()
    assert "bare on math: nothing can be told" in result.summary()
    json.dumps(result.to_json(), allow_nan=False)
    with pytest.warns(UserWarning, match="no gradients of the 3 samples of 'bare'"):
        zeros = matrix(found, "bare", "math", layer=0, block="Q", head=0, config=config)
    assert zeros.shape == (3, 12)
    np.testing.assert_array_equal(zeros, 0)
    with pytest.warns(UserWarning, match="'bare'"):
        pair = compute_sample_pair(found, "math", 0, "bare", 1, 0, 0, config=config)
    assert pair == dict.fromkeys("QKVO", 0.0)
    with pytest.warns(UserWarning, match="'bare'"):
        heat = compute_heatmap(found, "math", "bare", config=config)
    for part in heat.values():
        np.testing.assert_array_equal(part["layer_head_avg"], 0)
        assert part["top_conflicts"] == []


def test_tasks_of_which_some_gradients_are_stored(tmp_path):
    """Pairs use samples that have gradients, and the result says so; F is that of all where it was kept."""
    tasks = {"math": models.rows(6), "code": models.rows(5, seed=5)}
    found, expected = (
        fs.wrap(models.build(models.named("llama"), layers=1)).collect(
            tasks, tmp_path / f"{most}.fs", extensions=extensions, batch_size=2, quiet=True
        )
        for most in (3, None)
        for extensions in [("fisher", fs.SampleGradients(dtype="float32", max_samples=most))]
    )
    result = interference(found)
    assert result.details["samples"] == {"math": 3, "code": 3}
    assert any(
        "first 3 of the 6 samples of 'math': gradients of the others are not stored; F uses all" in note
        for note in result.warnings
    )
    whole = scores(expected, "math", "code", 0, "Q", 1, InterferenceConfig())
    np.testing.assert_allclose(
        scores(found, "math", "code", 0, "Q", 1, InterferenceConfig()), whole[:3, :3], rtol=1e-4
    )
    with pytest.raises(IndexError, match="gradients of the first 3: asked for row 4"):
        compute_sample_pair(found, "math", 4, "code", 0, 0, 0)
    full = interference(found, form="full")
    assert any("F uses these alone" in note for note in full.warnings)
    assert np.isfinite(full.frame["mean"]).all()


def test_few_samples_say_what_that_does(made):
    """The warning tells the number and its effect on scores."""
    notes = interference(made.store).warnings
    (note,) = [note for note in notes if "denominators are rough" in note]
    assert "F of 'code' is the mean of only 9 samples" in note
    assert "none stands out by more than a factor of 9" in note
    config = InterferenceConfig(aggregate="sum")
    left = scores(made.store, "code", "math", 0, "Q", 0, config)
    # what the note says: no entry of C / F exceeds the number of samples behind F
    size = made.layout.slice(0, "Q", 0).take(made.tasks["math"].gradients["layers.0.attn.q.weight"])
    assert (left <= 9 * size.abs().flatten(1).sum(1).numpy() * (1 + 1e-5)).all()


def test_all_pairs_of_three_tasks(made, layout, tmp_path):
    """Every ordered pair of tasks is there, also each with itself where that is asked for."""
    tasks = {**made.tasks, "more": made.tasks["code"].permuted([3, 1, 0, 2])}
    found = write_store(tmp_path / "run.fs", layout, tasks).store
    result = interference(found, include_self=True)
    pairs = result.frame.groupby(["task_a", "task_b"]).size()
    assert len(pairs) == 9
    assert (pairs == 24).all()
    two = interference(found, tasks=("more", "math"))
    assert set(two.frame["task_a"]) == {"more", "math"}
    both = [
        one.frame.set_index(["task_a", "task_b", "layer", "block", "head"])["mean"] for one in (result, two)
    ]
    np.testing.assert_allclose(both[0].loc[both[1].index], both[1], rtol=1e-6)


def test_layers_without_stored_gradients_are_left_out(tmp_path):
    """A heat map covers the layers that were collected; any other is an error that says what to collect."""
    kept = fs.SampleGradients(parameters=["*layers.1.self_attn*"], dtype="float32")
    tasks = {"math": models.rows(4), "code": models.rows(3, seed=5)}
    scope = fs.wrap(models.build(models.named("llama")))
    found = scope.collect(tasks, tmp_path / "run.fs", extensions=("fisher", kept), quiet=True)
    heat = compute_heatmap(found, "math", "code")
    assert heat["V"]["layer_head_avg"].coords["layer"].values.tolist() == [1]
    for ask in (
        lambda: compute_heatmap(found, "math", "code", layers=[0]),
        lambda: compute_sample_pair(found, "math", 0, "code", 0, 0, 0),
        lambda: compute_heatmap(found, "math", "code", stack="encoder"),
    ):
        with pytest.raises(KeyError, match=r'SampleGradients\(parameters="attention"\)'):
            ask()
