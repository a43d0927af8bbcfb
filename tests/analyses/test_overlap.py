"""Overlap and what chance would give."""

import numpy as np
import pytest
from scipy import stats

from fisherscope.analyses import AnalyzeConfig, MasksConfig, OverlapConfig, chance, run
from fisherscope.analyses.chance import expected_jaccard, overlap_p_value
from fisherscope.analyses.overlap import advise


@pytest.fixture(scope="module")
def outcomes(made):
    return run(made.store, ["masks", "overlap"])


@pytest.fixture(scope="module")
def result(outcomes):
    return outcomes["overlap"]


@pytest.mark.parametrize(("total", "a", "b"), [(24, 12, 12), (24, 2, 7), (9, 9, 3), (100, 30, 10)])
def test_chance_level_equals_simulation(total, a, b):
    """The expected Jaccard index is the mean over pairs of random masks of these sizes."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(4000):
        first, second = (set(rng.choice(total, size, replace=False)) for size in (a, b))
        found.append(len(first & second) / len(first | second))
    tolerance = 4 * np.std(found) / np.sqrt(len(found)) + 1e-12
    assert abs(expected_jaccard(total, a, b) - np.mean(found)) < tolerance


def test_p_value_is_the_upper_tail_of_the_hypergeometric():
    """P(X >= shared), by scipy, and by counting for a small case."""
    assert overlap_p_value(0, 24, 7, 7) == 1
    for total, a, b, shared in ((24, 7, 7, 5), (24, 20, 18, 15), (9, 1, 1, 1), (4000, 900, 1200, 320)):
        expected = stats.hypergeom(total, a, b).sf(shared - 1)
        np.testing.assert_allclose(overlap_p_value(shared, total, a, b), expected, rtol=1e-8)
    np.testing.assert_allclose(overlap_p_value(2, 4, 2, 2), 1 / 6)
    assert overlap_p_value(7, 10, 10, 7) == 1  # no choice: everything is shared


def test_normal_approximation_takes_over_smoothly(monkeypatch):
    """For very many units the approximation equals the exact sum closely."""
    cases = [(60_000, 20_000, 30_000, shared) for shared in (9_900, 10_000, 10_100, 10_200)]
    exact = [(expected_jaccard(n, a, b), overlap_p_value(x, n, a, b)) for n, a, b, x in cases]
    monkeypatch.setattr(chance, "_EXACT", 100)
    near = [(expected_jaccard(n, a, b), overlap_p_value(x, n, a, b)) for n, a, b, x in cases]
    np.testing.assert_allclose(near, exact, rtol=2e-2, atol=1e-6)


def test_counts_and_indices_equal_set_arithmetic(made, outcomes, result):
    """Jaccard, overlap coefficient and excess of heads and of single weights, over model and layer."""
    masks = outcomes["masks"]
    a, b = (masks.heads(task, 0.7) for task in ("math", "code"))
    for level, chosen in (("all", slice(None)), ("layer", a["layer"] == 1)):
        rows = result.frame[(result.frame["kind"] == "head") & (result.frame["sparsity"] == 0.7)]
        rows = rows[rows["level"] == level]
        row = rows[rows["layer"] == 1].iloc[0] if level == "layer" else rows.iloc[0]
        x, y = a["keep"][chosen], b["keep"][chosen]
        assert row["shared"] == (x & y).sum()
        np.testing.assert_allclose(row["jaccard"], (x & y).sum() / (x | y).sum())
        np.testing.assert_allclose(row["coefficient"], (x & y).sum() / min(x.sum(), y.sum()))
        np.testing.assert_allclose(row["chance"], expected_jaccard(len(x), x.sum(), y.sum()))
        np.testing.assert_allclose(row["excess"], row["jaccard"] - row["chance"])
    single = result.frame[(result.frame["kind"] == "unstructured") & (result.frame["level"] == "all")]
    shared = sum(
        int((masks.mask("math", 0.5, p.name) & masks.mask("code", 0.5, p.name)).sum())
        for p in masks.unstructured.parameters
    )
    assert single[single["sparsity"] == 0.5]["shared"].item() == shared


def test_layers_add_up_to_the_model(result):
    """Counts of the layers sum to those of the model, per kind and sparsity."""
    keys = ["kind", "sparsity"]
    counts = ["units", "kept_a", "kept_b", "shared"]
    layers = result.frame[result.frame["level"] == "layer"].groupby(keys)[counts].sum()
    whole = result.frame[result.frame["level"] == "all"].set_index(keys)[counts]
    assert (layers.sort_index() == whole.sort_index()).all(axis=None)


def test_identical_masks_overlap_wholly(made, layout, tmp_path):
    """Two tasks with the same samples share everything, far beyond chance, and the advice says so."""
    from tests.analyses.synthetic import write_store

    task = made.tasks["math"]
    twin = write_store(tmp_path / "run.fs", layout, {"a": task, "b": task})
    result = run(twin.store, ["overlap"])["overlap"]
    rows = result.frame[(result.frame["level"] == "all") & (result.frame["kind"] == "head")]
    assert rows["jaccard"].eq(1).all()
    assert (rows["p_value"] < 0.01).all()
    assert "high and more than chance" in result.extra["advice"]["advice"].iloc[0]


def row(**changes):
    base = {"task_a": "a", "task_b": "b", "kind": "head", "sparsity": 0.1}
    return base | {"jaccard": 0.8, "chance": 0.79, "excess": 0.01, "p_value": 0.4} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["the index is high", "by chance", "no evidence"]),
        ({"chance": 0.3, "excess": 0.5, "p_value": 1e-6}, ["high and more than chance", "adapters"]),
        ({"jaccard": 0.5, "chance": 0.2, "excess": 0.3, "p_value": 1e-6}, ["medium and more than chance"]),
        (
            {"jaccard": 0.3, "chance": 0.1, "excess": 0.2, "p_value": 1e-6},
            ["low and more than chance", "few"],
        ),
        ({"jaccard": 0.1, "chance": 0.1, "excess": 0.0}, ["low, no more than chance", "task arithmetic"]),
        ({"jaccard": float("nan")}, ["nothing to compare"]),
    ],
)
def test_advice_goes_by_the_band_and_by_the_excess(changes, words):
    """A high index that chance explains is not called a conflict."""
    text = advise(row(**changes), OverlapConfig())
    assert all(word in text for word in words), text


def test_regions_are_kept_by_both_and_ranked(made, outcomes):
    """Conflict regions lie in both masks; the smaller share (or the product) orders them."""
    for rank_by, score in (("min", np.minimum), ("product", np.multiply)):
        config = AnalyzeConfig(overlap=OverlapConfig(rank_by=rank_by), masks=MasksConfig(sparsities=(0.5,)))
        regions = run(made.store, ["overlap"], config)["overlap"].extra["regions"]
        heads = regions[regions["kind"] == "head"]
        np.testing.assert_allclose(heads["score"], score(heads["share_a"], heads["share_b"]))
        assert heads["score"].is_monotonic_decreasing
        masks = outcomes["masks"]
        for task in ("math", "code"):
            kept = masks.heads(task, 0.5)
            places = set(kept[kept["keep"]][["layer", "block", "head"]].itertuples(index=False, name=None))
            found = set(heads[["layer", "block", "index"]].itertuples(index=False, name=None))
            assert found <= places


def test_summary_gives_index_and_chance(result):
    """The summary puts the chance level beside every index."""
    assert result.summary().count("by chance") >= 3
