"""Interference against the naive double loop, and its identities."""

import numpy as np
import pandas as pd
import pytest
import torch

from fisherscope.analyses import AnalyzeConfig, ConflictConfig, InterferenceConfig, run
from fisherscope.analyses.interference import compute_sample_pair, interference_matrix, matrix
from tests.analyses.synthetic import all_slices, slice_of, write_store

PLACES = [(0, "Q", 3), (1, "K", 1), (0, "V", 0), (1, "O", 2)]


def interference(store, memory_budget=1 << 30, **options):
    config = AnalyzeConfig(
        interference=InterferenceConfig(**options),
        conflict=ConflictConfig(calibration_splits=0),
        memory_budget=memory_budget,
    )
    return run(store, ["interference"], config)["interference"]


@pytest.fixture(scope="module")
def result(made):
    return interference(made.store)


def naive(made, a, b, layer, block, head, *, aggregate="mean", pool="A", scale=None, part="weight"):
    """The formula entry by entry, sample by sample, in float64."""
    piece = made.layout.slice(layer, block, head, part=part)
    h = {task: made.tasks[task].h(piece.parameter) for task in (a, b)}
    whole = {task: (values**2).mean(0) for task, values in h.items()}
    fisher = {"A": whole[a], "B": whole[b], "pooled": (whole[a] + whole[b]) / 2}[pool]
    lam = 1e-6 * np.median(fisher.numpy())
    f = piece.take(fisher).flatten()
    left = piece.take(h[a]).flatten(1)
    right = piece.take(made.tasks[b].gradients[piece.parameter].double()).flatten(1)
    scores = np.zeros((len(left), len(right)))
    for i, hi in enumerate(left):
        for j, gj in enumerate(right):
            factor = 1.0 if scale is None else scale[j]
            terms = hi**2 / (f + lam) * (gj * factor).abs()
            scores[i, j] = terms.mean() if aggregate == "mean" else terms.sum()
    return scores


@pytest.mark.parametrize(("layer", "block", "head"), PLACES)
def test_matrix_equals_the_double_loop(made, layer, block, head):
    """All pairs of a slice, one matrix product: relative error below 1e-5."""
    found = matrix(made.store, "math", "code", layer=layer, block=block, head=head)
    np.testing.assert_allclose(found, naive(made, "math", "code", layer, block, head), rtol=1e-5)
    assert found.dims == ("sample_a", "sample_b")
    assert found.coords["sample_b"].to_numpy()[4] == "code_4"


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
@pytest.mark.parametrize("pool", ["A", "B", "pooled"])
def test_aggregates_and_pools_equal_the_double_loop(made, aggregate, pool):
    """Mean or sum over the slice, with either task's F or the mean of both."""
    config = InterferenceConfig(aggregate=aggregate, fisher_pool=pool)
    found = matrix(made.store, "code", "math", layer=1, block="O", head=0, config=config)
    expected = naive(made, "code", "math", 1, "O", 0, aggregate=aggregate, pool=pool)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("rule", "column"), [("per_token_mean", "length"), ("per_token_sum", "tokens")])
def test_gradient_normalisations(made, rule, column):
    """The second task's gradients over their attended length, or over their loss-bearing tokens."""
    config = InterferenceConfig(normalize_gj=rule)
    found = matrix(made.store, "math", "code", layer=0, block="K", head=0, config=config)
    scale = 1 / getattr(made.tasks["code"], column)
    np.testing.assert_allclose(found, naive(made, "math", "code", 0, "K", 0, scale=scale), rtol=1e-5)


def test_biases_are_slices_of_their_own(made):
    """With part="bias" the slices of the Q, K and V biases are scored; O has none."""
    found = matrix(
        made.store, "math", "code", layer=0, block="V", head=1, config=InterferenceConfig(part="bias")
    )
    np.testing.assert_allclose(found, naive(made, "math", "code", 0, "V", 1, part="bias"), rtol=1e-5)
    assert set(interference(made.store, part="bias").frame["block"]) == {"Q", "K", "V"}


def test_table_equals_the_matrices(made, result):
    """What is told of every slice and ordered pair is told of its matrix; nothing is left out."""
    assert len(result.frame) == 2 * 24
    for row in result.frame.to_dict("records"):
        place = {key: row[key] for key in ("layer", "block", "head")}
        scores = matrix(made.store, row["task_a"], row["task_b"], **place)
        np.testing.assert_allclose([row["mean"], row["max"]], [scores.mean(), scores.max()], rtol=1e-5)
        strong = np.quantile(scores.mean("sample_b").values, 0.95)
        np.testing.assert_allclose(row["sample_q95"], strong, rtol=1e-5)
        assert (
            float(result.data["mean"].sel(task_a=row["task_a"], task_b=row["task_b"], **place)) == row["mean"]
        )
    assert (result.frame[["mean", "max"]] >= 0).to_numpy().all()


def test_health_of_the_denominators(made, result):
    """Minimum, median, maximum of F, the share below epsilon, and the ridge as applied."""
    rows = result.frame[(result.frame["task_a"] == "math") & (result.frame["layer"] == 1)]
    row = rows[(rows["block"] == "Q") & (rows["head"] == 2)].iloc[0]
    whole = (made.tasks["math"].h("layers.1.attn.q.weight") ** 2).mean(0)
    f = slice_of(made.layout, whole[None], 1, "Q", 2)[0]
    expected = [f.min(), f.median(), f.max(), 1e-6 * np.median(whole.numpy())]
    found = [row["fisher_min"], row["fisher_median"], row["fisher_max"], row["ridge"]]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert row["below_epsilon"] == 0
    high = interference(made.store, epsilon=1.0, ridge=2.0).frame
    assert high["below_epsilon"].eq(1).all()
    assert high["ridge"].eq(2).all()


def test_head_slices_add_up_to_the_block(made):
    """With aggregate="sum" the scores of the heads sum to that of the whole block."""
    config = InterferenceConfig(aggregate="sum")
    for block, heads in (("Q", 4), ("K", 2), ("O", 4)):
        parts = sum(
            matrix(made.store, "math", "code", layer=0, block=block, head=head, config=config).to_numpy()
            for head in range(heads)
        )
        name = f"layers.0.attn.{block.lower()}.weight"
        h = made.tasks["math"].h(name).flatten(1)
        fisher = (h**2).mean(0)
        g = made.tasks["code"].gradients[name].double().flatten(1)
        whole = interference_matrix(h, g, fisher, 1e-6 * float(np.median(fisher)), aggregate="sum")
        np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_scale_of_the_loss(made, layout, tmp_path, result):
    """Loss times a multiplies the unsigned score by a: C / F does not change, |g| does."""
    tasks = {name: task.scaled(64.0) for name, task in made.tasks.items()}
    other = interference(write_store(tmp_path / "run.fs", layout, tasks).store)
    np.testing.assert_allclose(other.frame["mean"], 64 * result.frame["mean"], rtol=1e-5)


def test_order_of_samples_only_permutes(made, layout, tmp_path, result):
    """Shuffled samples give shuffled scores and the same table; random labels fall on other samples."""
    order = [5, 2, 0, 11, 3, 1, 4, 6, 10, 9, 8, 7]
    tasks = {"math": made.tasks["math"].permuted(order), "code": made.tasks["code"]}
    store = write_store(tmp_path / "run.fs", layout, tasks).store
    for a, b in (("math", "code"), ("code", "math")):
        found = matrix(store, a, b, layer=1, block="V", head=0).to_numpy()
        before = matrix(made.store, a, b, layer=1, block="V", head=0).to_numpy()
        np.testing.assert_allclose(found, before[order] if a == "math" else before[:, order], rtol=1e-5)
    drawn = ["p", "p_max", "q"]
    found = interference(store).frame.drop(columns=drawn)
    pd.testing.assert_frame_equal(found, result.frame.drop(columns=drawn), rtol=1e-5)


def test_streaming_in_stretches_of_samples_changes_nothing(made, result, monkeypatch):
    """Slices beyond the memory budget are read in stretches of samples, with the same scores."""
    monkeypatch.setattr("fisherscope.analyses.slices._COPIES", 1 << 7)
    small = interference(made.store, memory_budget=1 << 16)
    pd.testing.assert_frame_equal(small.frame, result.frame, rtol=1e-5)
    np.testing.assert_allclose(small.top(50)["score"], result.top(50)["score"], rtol=1e-5)


def test_top_pairs_are_the_highest_of_all_slices(made, result):
    """The list holds the highest scores over every slice, with ids and texts of both samples."""
    everything = []
    for layer, block, head, _ in all_slices(made.layout):
        scores = matrix(made.store, "math", "code", layer=layer, block=block, head=head).to_numpy()
        everything.extend(
            (score, f"math_{i}", f"code_{j}", layer, block, head) for (i, j), score in np.ndenumerate(scores)
        )
    everything.sort(key=lambda found: -found[0])
    top = result.top(20, task_a="math", task_b="code")
    np.testing.assert_allclose(top["score"], [found[0] for found in everything[:20]], rtol=1e-5)
    columns = ["sample_i", "sample_j", "layer", "block", "head"]
    assert top[columns].iloc[0].tolist() == list(everything[0][1:])
    assert top["text_i"].str.startswith("math text").all()
    assert result.top(5, block="K")["block"].eq("K").all()
    assert result.top(500)["score"].is_monotonic_decreasing


def test_limited_pairs_use_all_samples_for_fisher(made, result):
    """The first samples form pairs; the denominator stays that of all samples; the result says so."""
    small = interference(made.store, max_samples_per_task=4)
    whole = matrix(made.store, "math", "code", layer=0, block="Q", head=1)
    row = small.frame[(small.frame["task_a"] == "math") & (small.frame["layer"] == 0)]
    row = row[(row["block"] == "Q") & (row["head"] == 1)].iloc[0]
    np.testing.assert_allclose(row["mean"], whole[:4, :4].mean(), rtol=1e-5)
    np.testing.assert_allclose(small.frame["fisher_median"], result.frame["fisher_median"])
    assert any("first 4 of the 12 samples of 'math'; F uses all" in note for note in small.warnings)


def test_a_task_with_itself_leaves_out_the_sample_with_itself(made):
    """Optional pairs of a task with itself; also the only pair of a store with one task."""
    both = interference(made.store, include_self=True)
    assert len(both.frame) == 4 * 24
    scores = naive(made, "math", "math", 1, "O", 3)
    off = scores[~np.eye(len(scores), dtype=bool)]
    found = float(both.data["mean"].sel(task_a="math", task_b="math", layer=1, block="O", head=3))
    np.testing.assert_allclose(found, off.mean(), rtol=1e-5)
    own = both.extra["pairs"]
    own = own[own["task_a"] == own["task_b"]]
    assert (own["sample_i"] != own["sample_j"]).all()
    config = AnalyzeConfig(tasks=("code",), interference=InterferenceConfig(include_self=True))
    assert len(run(made.store, ["interference"], config)["interference"].frame) == 24


def test_flat_slices_give_zero_and_a_flag(made, layout, tmp_path):
    """Where F is 0 throughout the score is 0, not infinite, and the slice is flagged, in any pool."""
    tasks = {name: task.scaled(1.0) for name, task in made.tasks.items()}
    piece = layout.slice(1, "V", 0)
    piece.take(tasks["math"].gradients[piece.parameter])[:] = 0
    store = write_store(tmp_path / "run.fs", layout, tasks).store
    for pool in ("A", "B", "pooled"):
        result = interference(store, fisher_pool=pool)
        assert np.isfinite(result.frame[["mean", "max"]]).to_numpy().all()
        flat = result.frame[result.frame["flat"]]
        expected = {"A": [("math", "code")], "B": [("code", "math")], "pooled": []}[pool]
        assert list(zip(flat["task_a"], flat["task_b"], strict=True)) == expected
        assert flat[["mean", "max"]].eq(0).to_numpy().all()
        assert any("F = 0 throughout" in note for note in result.warnings) == bool(expected)


def test_single_zero_entries_do_not_explode():
    """An entry whose F is 0 adds nothing, whatever C is there."""
    h = torch.tensor([[20.0, 1.0], [0.0, 1.0]])
    f, g = torch.tensor([0.0, 1.0]), torch.tensor([[0.0, 2.0]])
    for form in ("unsigned", "natural", "signed", "symmetric"):
        found = interference_matrix(h, g, f, 1.2e-38, form=form, aggregate="sum")
        np.testing.assert_allclose(found, [[2.0], [2.0]], err_msg=form)


def test_fisher_from_gradients_where_full_shape_is_absent(lean, result):
    """F of a slice then is the mean over the stored gradients of all samples."""
    other = interference(lean.store)
    assert (result.config["fisher_source"], other.config["fisher_source"]) == ("full", "gradients")
    pd.testing.assert_frame_equal(other.frame, result.frame, rtol=1e-4)
    limited = interference(lean.store, max_samples_per_task=2)
    np.testing.assert_allclose(limited.frame["fisher_median"], other.frame["fisher_median"])


def test_per_query_head_repeats_kv_heads_and_says_so(result):
    """K and V of a query head are those of its kv head; Q and O stay; a note tells."""
    view = result.per_query_head()
    assert view.sizes["head"] == 4
    assert view["mean"].sel(task_a="math", task_b="code").notnull().all()
    for query in range(4):
        for block, head in (("K", query // 2), ("V", query // 2), ("Q", query), ("O", query)):
            expected = result.data["mean"].sel(block=block, head=head, task_a="code", task_b="math")
            got = view["mean"].sel(block=block, head=query, task_a="code", task_b="math")
            np.testing.assert_array_equal(got, expected)
    assert "repeat" in view.attrs["note"]
    assert result.to_json()["details"]["gqa"][0]["kv_head"] == [0, 0, 1, 1]


def test_one_pair_of_samples_on_the_slices_of_a_query_head(made):
    """Four scores, K and V from the kv head that the query head uses."""
    found = compute_sample_pair(made.store, "math", 3, "code", 7, layer=1, head=3)
    expected = {
        block: naive(made, "math", "code", 1, block, head)[3, 7]
        for block, head in (("Q", 3), ("K", 1), ("V", 1), ("O", 3))
    }
    assert list(found) == ["Q", "K", "V", "O"]
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    with pytest.raises(IndexError, match="12 samples"):
        compute_sample_pair(made.store, "math", 12, "code", 0, layer=1, head=3)


def test_unknown_places_are_named(made):
    """A head, layer or task that does not exist is an error that says what there is."""
    with pytest.raises(IndexError, match="K of layer 0 has 2 heads"):
        matrix(made.store, "math", "code", layer=0, block="K", head=2)
    with pytest.raises(KeyError, match="layer 7"):
        matrix(made.store, "math", "code", layer=7, block="K", head=0)
    with pytest.raises(KeyError, match="mth"):
        matrix(made.store, "mth", "code", layer=0, block="K", head=0)


def test_few_samples_warn(made):
    """A rough F is named: few samples behind the denominators."""
    result = interference(made.store, min_samples_for_fisher=10)
    assert any("'code' is the mean of only 9 samples" in note for note in result.warnings)
    assert not any("'math' is the mean" in note for note in result.warnings)


def test_data_saves_and_loads(result, tmp_path):
    """The arrays go to a netCDF file and come back."""
    import xarray as xr

    result.data.to_netcdf(tmp_path / "x.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "x.nc", engine="h5netcdf") as loaded:
        xr.testing.assert_equal(loaded.load(), result.data)


def test_summary_does_not_overclaim(result):
    """It names slices and pairs, and says what the score does not tell."""
    text = result.summary()
    assert "math on code: the score that 5% of math's samples exceed is highest at L" in text
    assert "not whether that helps or harms" in text


def test_whether_samples_oppose_each_other_is_told_by_the_test_of_conflict(made):
    """Mean cosine, p and q of the conflict analysis on each slice, the same for both orders."""
    config = AnalyzeConfig(interference=InterferenceConfig(form="natural"))
    outcomes = run(made.store, ["conflict", "interference"], config)
    levels = outcomes["conflict"].extra["levels"]
    slices = levels[levels["level"] == "slice"].set_index(["layer", "block", "head"])
    frame = outcomes["interference"].frame
    assert len(frame) == 2 * len(slices)
    for _, rows in frame.groupby("task_a"):
        both = rows.set_index(["layer", "block", "head"]).join(slices.add_suffix("_conflict"))
        np.testing.assert_array_equal(both["cosine"], both["mean_conflict"])
        np.testing.assert_array_equal(both["cosine_p"], both["p_conflict"])
        np.testing.assert_array_equal(both["cosine_q"], both["q_conflict"])
        assert both["cosine_q"].notna().all()
    assert "cosine_q" in outcomes["interference"].data


def test_without_a_test_of_conflict_nothing_is_claimed(made, monkeypatch):
    """Slices of biases and a task alone have none; where the analysis failed, a warning says so."""
    for options in ({"part": "bias"}, {"include_self": True}):
        tasks = ("code",) if "include_self" in options else None
        config = AnalyzeConfig(tasks=tasks, interference=InterferenceConfig(**options))
        found = run(made.store, ["interference"], config)["interference"]
        assert found.frame["cosine_q"].isna().all()
        assert not any("not tested" in note for note in found.warnings)
    monkeypatch.setattr("fisherscope.analyses.conflict.analysis._Run", None)
    found = run(made.store, ["interference"])["interference"]
    assert found.frame["cosine_q"].isna().all()
    assert any("was not tested" in note and "conflict" in note for note in found.warnings)


def test_withheld_q_values_are_said_to_be(made, monkeypatch):
    """Where the test of means calls too much on random halves, its columns say nothing, and a note why."""
    from fisherscope.analyses.conflict import calibration

    monkeypatch.setattr(calibration, "block_test", lambda cross, margin: (np.array(-9.0), np.array(1e-9)))
    found = run(made.store, ["interference"])["interference"]
    assert found.frame["cosine_q"].isna().all()
    assert found.frame["cosine_p"].notna().any()
    assert any("q-values of mean cosines of math and code are withheld" in note for note in found.warnings)
