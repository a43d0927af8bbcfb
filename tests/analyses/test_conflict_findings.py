"""What the conflict analysis finds: the tests wired to a store, against the pure functions and by hand."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from fisherscope.analyses import AnalyzeConfig, ConflictConfig, run
from fisherscope.analyses.conflict import (
    adjust,
    block_test,
    cosines,
    different_cluster_mean,
    group_test,
    pair_test,
    sample_test,
)
from tests.analyses.synthetic import Task, all_slices, slice_of, write_store

TWINS = 12


def analysed(store, **options):
    settings = AnalyzeConfig(conflict=ConflictConfig(**options))
    return run(store, ["conflict"], settings)["conflict"]


def noise(layout, name, n, seed):
    """Gradients of two dozen directions with random weights: correlated, without a mean."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(1000)
    scores = torch.randn(n, 24, generator=generator)
    gradients = {}
    for info in layout.parameters[1:]:
        directions = torch.randn(24, *info.shape, generator=shared)
        own = torch.randn(n, *info.shape, generator=generator)
        gradients[info.name] = (torch.tensordot(scores, directions, 1) / 24**0.5 + own) * 1e-3
    tokens = torch.randint(1, 9, (n,), generator=generator).numpy()
    return Task(gradients, tokens, tokens + 3, [f"{name} text {i}" for i in range(n)])


@pytest.fixture(scope="module")
def planted(layout, tmp_path_factory):
    """Forty samples per task; the first twelve of both share a strong direction of their own, opposed."""
    a, b = noise(layout, "a", 40, 1), noise(layout, "b", 40, 2)
    generator = torch.Generator().manual_seed(7)
    for name, gradient in a.gradients.items():
        for k in range(TWINS):
            direction = torch.randn(gradient.shape[1:], generator=generator) * 3e-3
            gradient[k] += direction
            b.gradients[name][k] -= direction
    return write_store(tmp_path_factory.mktemp("planted") / "run.fs", layout, {"a": a, "b": b})


@pytest.fixture(scope="module")
def found(planted):
    return analysed(planted.store)


def grams(made, place=None):
    """Cosines across and within, float64: of one slice (layer, block, head), or of all."""
    parts = {"a": [], "b": []}
    for layer, block, head, parameter in all_slices(made.layout):
        if place not in (None, (layer, block, head)):
            continue
        pooled = sum((made.tasks[t].h(parameter) ** 2).mean(0) for t in parts) / 2
        lam = 1e-6 * pooled.median()
        fisher = slice_of(made.layout, pooled[None], layer, block, head)[0]
        for task, rows in parts.items():
            h = slice_of(made.layout, made.tasks[task].h(parameter), layer, block, head)
            rows.append(h / (fisher + lam).sqrt())
    u, v = (torch.nn.functional.normalize(torch.cat(rows, 1)).numpy() for rows in parts.values())
    return u @ v.T, u @ u.T, v @ v.T


def test_pairs_have_p_and_q_of_the_pair_test(planted, found):
    """T1 over all attention weights: all planted pairs and next to nothing else."""
    p = pair_test(*grams(planted))
    q = adjust(p)
    frame = found.frame
    i, j = (frame[f"sample_{side}"].str.rpartition("_")[2].astype(int) for side in "ab")
    np.testing.assert_allclose(frame["p"], p[i, j], rtol=1e-2)
    np.testing.assert_allclose(frame["q"], q[i, j], rtol=1e-2)
    assert (frame["found"] == (frame["q"] <= 0.05)).all()
    called = frame[frame["found"]]
    twins = {(f"a_{k}", f"b_{k}") for k in range(TWINS)}
    pairs = set(zip(called["sample_a"], called["sample_b"], strict=True))
    assert len(twins & pairs) >= 11
    assert len(pairs - twins) <= 2


def test_heads_are_those_of_the_group_test(planted, found):
    """T3, streamed slice by slice, equals the test of all slices at once."""
    places = [place[:3] for place in all_slices(planted.layout)]
    p = np.stack([pair_test(*grams(planted, place)) for place in places])
    expected = group_test(p)
    called = {
        (f"a_{i}", f"b_{j}", *places[k]): p[k, i, j] for k, i, j in np.argwhere(expected.rejected).tolist()
    }
    assert len(called) > 50
    heads = found.extra["heads"]
    columns = ["sample_a", "sample_b", "layer", "block", "head"]
    got = {tuple(row[c] for c in columns): row["p"] for row in heads.to_dict("records")}
    # cosines of float32 gradients: a call at the very edge may differ
    assert len(got.keys() ^ called.keys()) <= 0.02 * len(called)
    for key in got.keys() & called.keys():
        np.testing.assert_allclose(got[key], called[key], rtol=0.05)
    assert heads["q"].le(0.05).all()
    assert found.extra["verdicts"]["heads"].item() == len(heads[["sample_a", "sample_b"]].drop_duplicates())


def test_the_q_of_a_call_pays_for_the_selection(planted):
    """q of a slice is that within its pair times all over selected pairs, and at least that of the pair."""
    from fisherscope.analyses.conflict.cosines import Blocks
    from fisherscope.analyses.conflict.head_tests import HeadTests

    places = [place[:3] for place in all_slices(planted.layout)]
    tests = HeadTests((40, 40), 0.05, "bh", 1 << 30)
    stack = []
    for place in places:
        cross, a, b = grams(planted, place)
        tests.take(Blocks(np.block([[a, cross], [cross.T, b]]), 40))
        stack.append(pair_test(cross, a, b))
    called, expected = tests.called(), group_test(np.stack(stack))
    np.testing.assert_allclose(called.p, expected.p, rtol=1e-6)
    where = called.slice, called.row, called.column
    assert set(zip(*(part.tolist() for part in where), strict=True)) == set(
        map(tuple, np.argwhere(expected.rejected).tolist())
    )
    paid = expected.within_q[where] * 1600 / expected.selected.sum()
    np.testing.assert_allclose(called.slice_q, np.maximum(paid, expected.q[where[1:]]), rtol=1e-6)


def test_fewer_p_values_are_kept_where_memory_is_short(planted):
    """Under a small budget the calls are a subset: those with the smallest p."""
    from fisherscope.analyses.conflict.cosines import Blocks
    from fisherscope.analyses.conflict.head_tests import HeadTests

    places = [place[:3] for place in all_slices(planted.layout)]
    results = []
    for budget in (1 << 30, 32 * 60):
        tests = HeadTests((40, 40), 0.05, "bh", budget)
        for place in places:
            cross, a, b = grams(planted, place)
            tests.take(Blocks(np.block([[a, cross], [cross.T, b]]), 40))
        results.append(tests.called())
    full, short = (
        set(zip(c.row.tolist(), c.column.tolist(), c.slice.tolist(), strict=True)) for c in results
    )
    assert 0 < len(short) <= 60
    assert short < full
    assert results[1].slice_p.max() < np.median(results[0].slice_p)


def test_a_sentence_for_each_finding(found):
    """With ids, place, cosine, effect size and q."""
    heads = found.extra["heads"]
    row = heads.iloc[0]
    assert row["finding"] == (
        f"{row['sample_a']} conflicts with {row['sample_b']} in layer {row['layer']}, {row['block']}, head "
        f"{row['head']} (cos {row['cosine']:.2f}, d {row['effect_size']:.2f}, q {row['q']:.2g})"
    )
    assert found.findings[0] == row["finding"]
    assert row["text_a"] == f"a text {row['sample_a'].removeprefix('a_')}"
    assert row["text_b"] == f"b text {row['sample_b'].removeprefix('b_')}"
    assert row["finding"] in found.summary()
    np.testing.assert_allclose(heads["excess"], heads["cosine"] - heads["reference"])


def test_samples_are_tested_against_the_other_task(planted, found):
    """T2 in both directions, corrected together; opposed only where that is more than to the own task."""
    cross, a, b = grams(planted)
    below, own = [], []
    for rows, within in ((cross, a), (cross.T, b)):
        for i, row in enumerate(rows):
            others = np.delete(within[i], i)
            below.append(stats.ttest_ind(row, others, equal_var=False, alternative="less").pvalue)
            own.append(others.mean())
    other = np.concatenate([sample_test(cross), sample_test(cross.T)])
    p = np.maximum(other, below)
    q = adjust(np.minimum(1, 2 * np.minimum(p, 1 - other)))
    samples = found.extra["samples"]
    assert samples["sample"].tolist() == [f"{t}_{i}" for t in "ab" for i in range(40)]
    assert (samples["task"] + samples["against"]).unique().tolist() == ["ab", "ba"]
    np.testing.assert_allclose(samples["p"], p, rtol=1e-2, atol=1e-12)
    np.testing.assert_allclose(samples["q"], q, rtol=1e-2, atol=1e-12)
    direction = np.where(q <= 0.05, np.where(p < 1 - other, -1, 1), 0)
    assert (samples["direction"] == direction).all()
    mean = np.concatenate([cross.mean(1), cross.mean(0)])
    np.testing.assert_allclose(samples["mean_cosine"], mean, atol=1e-5)
    np.testing.assert_allclose(samples["own_cosine"], own, atol=1e-5)
    calls = found.frame[found.frame["found"]]
    degree = pd.concat([calls["sample_a"], calls["sample_b"]]).value_counts()
    assert samples["degree"].tolist() == [degree.get(name, 0) for name in samples["sample"]]
    names = [f"layers.{k}.attn.{p}.weight" for k in (0, 1) for p in "qkvo"]
    h = sum((planted.tasks["a"].h(name) ** 2).flatten(1).sum(1) for name in names).sqrt()
    np.testing.assert_allclose(samples["gradient_norm"][:40], h, rtol=1e-5)


def test_levels_are_tested_against_what_clusters_of_one_task_do(planted, found):
    """T4 at a slice and over the whole: t, p, margin, BH within a level, variance between and within."""
    levels = found.extra["levels"]
    for place, query in (
        (None, "level == 'whole'"),
        ((0, "Q", 1), "level == 'slice' and layer == 0 and block == 'Q' and head == 1"),
    ):
        cross, a, b = grams(planted, place)
        row = levels.query(query).iloc[0]
        margin = max(0.0, -different_cluster_mean(a), -different_cluster_mean(b))
        t, p = block_test(cross, margin=margin)
        np.testing.assert_allclose([row["margin"], row["t"], row["p"]], [margin, t, p], rtol=1e-2, atol=1e-5)
        within = np.mean([(w.sum() - 40) / (40 * 39) for w in (a, b)])
        np.testing.assert_allclose(row["variance_within"], 1 - within, atol=1e-5)
        np.testing.assert_allclose(row["variance_between"], within - cross.mean(), atol=1e-5)
    slices = levels[levels["level"] == "slice"]
    np.testing.assert_allclose(slices["q"], adjust(slices["p"].to_numpy()))


def test_variance_between_is_that_of_the_means(layout, tmp_path):
    """Without bias: half the squared distance of the mean unit gradients, less what noise adds to it."""
    generator = np.random.default_rng(0)
    means = generator.normal(size=(2, 50))
    u, v = (means[k] + 3 * generator.normal(size=(4000, 50)) for k in range(2))
    u, v = (w / np.linalg.norm(w, axis=1, keepdims=True) for w in (u, v))
    from fisherscope.analyses.conflict.cosines import Blocks
    from fisherscope.analyses.conflict.levels import Level

    few = [
        Level.of(Blocks(cosines(np.r_[a, b] @ np.r_[a, b].T), len(a)), 0.0) for a, b in ((u[:40], v[:40]),)
    ]
    true = ((u.mean(0) - v.mean(0)) ** 2).sum() / 2
    assert abs(few[0].variance_between - true) < 0.02
    naive = ((u[:40].mean(0) - v[:40].mean(0)) ** 2).sum() / 2
    assert naive - true > 0.015


@pytest.mark.parametrize(("correction", "power"), [("by", True), ("ebh", True)])
def test_other_corrections_call_less(planted, found, correction, power):
    """BY and e-BH, which hold under any dependence."""
    other = analysed(planted.store, correction=correction, calibration_splits=0)
    calls, fewer = (
        set(map(tuple, f.frame[f.frame["found"]][["sample_a", "sample_b"]].values)) for f in (found, other)
    )
    assert fewer <= calls
    assert bool(fewer) == power


def test_min_effect_size_filters_reports_and_not_tests(planted, found):
    """q-values stay as they are; what is less opposed is not reported."""
    level = float(-found.frame.loc[found.frame["found"], "excess"].median())
    other = analysed(planted.store, min_effect_size=level)
    assert (other.frame["excess"] <= -level).all()
    assert (other.extra["heads"]["excess"] <= -level).all()
    both = found.frame.merge(other.frame, on=["sample_a", "sample_b"])
    np.testing.assert_array_equal(both["q_x"], both["q_y"])


def test_verdict_found(found):
    """In words, with numbers of findings."""
    (row,) = found.extra["verdicts"].to_dict("records")
    assert row["verdict"] == "found"
    assert row["pairs"] == found.frame["found"].sum() >= 11
    assert f"{row['pairs']} pairs of 1,600 conflict" in row["reason"]
    assert f"a and b: found. {row['reason']}" in found.summary()


def test_verdict_nothing_found(layout, tmp_path):
    """Two halves of one task: nothing, and what would have been found."""
    tasks = {name: noise(layout, name, 60, seed) for name, seed in (("a", 3), ("b", 4))}
    result = analysed(write_store(tmp_path / "run.fs", layout, tasks).store)
    (row,) = result.extra["verdicts"].to_dict("records")
    assert (row["verdict"], row["pairs"], row["heads"], row["samples"], row["blocks"]) == (
        "nothing found",
        0,
        0,
        0,
        0,
    )
    assert -1 < row["detectable"] < -0.3
    assert f"about {row['detectable']:.2f}" in row["reason"]
    assert not result.frame["found"].any()


@pytest.mark.parametrize("n", [1, 3, 6])
def test_verdict_cannot_tell_with_few_samples(layout, tmp_path, n):
    """Too few samples to find anything is not the same as nothing found."""
    tasks = {name: noise(layout, name, n, seed) for name, seed in (("a", 3), ("b", 4))}
    result = analysed(write_store(tmp_path / "run.fs", layout, tasks).store)
    (row,) = result.extra["verdicts"].to_dict("records")
    assert row["verdict"] == "cannot tell"
    assert ("four different samples" in row["reason"]) == (n < 4)
    result.to_json()


def test_without_stored_gradients_nothing_can_be_told(made, layout, tmp_path):
    """A task with samples but no gradients: a verdict and a warning, and the other pairs as ever."""
    tasks = {**made.tasks, "none": made.tasks["math"].scaled(1.0)}
    store = write_store(tmp_path / "run.fs", layout, tasks, without=("none",)).store
    result = analysed(store)
    verdicts = result.extra["verdicts"].set_index(["task_a", "task_b"])["verdict"]
    assert verdicts["math", "none"] == verdicts["code", "none"] == "cannot tell"
    assert any("no gradients of the 12 samples of 'none'" in note for note in result.warnings)
    np.testing.assert_allclose(result.cosines("math", "code"), analysed(made.store).cosines("math", "code"))
    result.to_json()


def test_tests_that_reject_where_nothing_is_are_withheld(planted, monkeypatch):
    """Where splits of single tasks reject too often: no q, no finding, the reason, and "cannot tell"."""
    from fisherscope.analyses.conflict import calibration

    monkeypatch.setattr(calibration, "pair_test", lambda cross, a, b: np.full(cross.shape, 1e-9))
    result = analysed(planted.store)
    assert result.frame["q"].isna().all()
    assert not result.frame["found"].any()
    assert result.frame["p"].notna().all()
    assert result.extra["heads"].empty
    (row,) = result.extra["verdicts"].to_dict("records")
    assert "20 of 20 random splits" in row["reason"]
    assert "withheld" in row["reason"]
    calibration_rows = result.extra["calibration"].set_index("test")
    assert calibration_rows["calibrated"].to_dict() == {"pairs": False, "heads": False, "blocks": True}
    result.to_json()


def test_means_are_withheld_where_their_test_is_not_calibrated(planted, monkeypatch):
    """The test of blocks by itself."""
    from fisherscope.analyses.conflict import calibration

    monkeypatch.setattr(calibration, "block_test", lambda cross, margin: (np.array(-9.0), np.array(1e-9)))
    result = analysed(planted.store)
    assert result.extra["levels"]["q"].isna().all()
    assert result.extra["levels"]["p"].notna().all()
    assert result.frame["found"].any()


def test_recommendations_follow_the_findings(planted, found):
    """Weights below 1 for samples in conflict alone, as JSON lines; lists name ids of the store."""
    lines = [json.loads(line) for line in found.files()["weights.jsonl"].splitlines()]
    assert [line["id"] for line in lines] == [f"{t}_{i}" for t in "ab" for i in range(40)]
    weight = {line["id"]: line["weight"] for line in lines}
    calls = found.frame[found.frame["found"]]
    involved = {*calls["sample_a"], *calls["sample_b"]}
    opposed = set(found.extra["samples"].query("direction < 0")["sample"])
    assert {name for name, w in weight.items() if w < 1} == involved | opposed
    assert sorted(found.recommendations.curriculum["order"]) == list(range(80))
    assert found.extra["clusters"]["pairs"].sum() <= len(calls)
    assert found.extra["hot_spots"].query("level == 'slice'")["pairs"].sum() == len(found.extra["heads"])


def test_samples_without_gradient_take_no_part(planted, layout, tmp_path):
    """Neither tested nor counted; the others are tested as if it were not there."""
    tasks = {name: task.scaled(1.0) for name, task in planted.tasks.items()}
    for task in tasks.values():
        for gradient in task.gradients.values():
            gradient[39] = 0
    rest = {name: task.permuted(list(range(39))) for name, task in tasks.items()}
    with_zero = analysed(write_store(tmp_path / "zero.fs", layout, tasks).store, top_pairs=2000)
    without = analysed(write_store(tmp_path / "rest.fs", layout, rest).store, top_pairs=2000)
    assert "a_39" not in set(with_zero.frame["sample_a"])
    both = with_zero.frame.merge(without.frame, on=["sample_a", "sample_b"], validate="1:1")
    assert len(both) == len(with_zero.frame) == len(without.frame)
    # F has one sample more, which adds nothing: cosines stay, up to that scale
    np.testing.assert_allclose(both["cosine_x"], both["cosine_y"], atol=1e-4)
    np.testing.assert_allclose(both["p_x"], both["p_y"], rtol=0.05, atol=1e-4)
    row = with_zero.extra["samples"].query("sample == 'a_39'").iloc[0]
    assert np.isnan(row["p"])
    assert row["direction"] == 0


def test_copies_of_one_sample_cannot_be_tested(layout, tmp_path):
    """A task of copies leaves no noise to compare with: no p, no exception."""
    one = noise(layout, "a", 8, 1).permuted([0] * 8)
    store = write_store(tmp_path / "run.fs", layout, {"a": one, "b": noise(layout, "b", 8, 2)}).store
    result = analysed(store)
    assert result.frame["p"].isna().all()
    assert result.extra["verdicts"]["verdict"].item() in {"cannot tell", "found"}


def test_same_seed_same_result(planted, found):
    """Splits, clusters and all."""
    again = analysed(planted.store)
    for name, table in found.tables().items():
        pd.testing.assert_frame_equal(table, again.tables()[name])


def test_small_means_are_called_small(layout, tmp_path):
    """Tasks that oppose each other everywhere, and slightly: found, and said to be a small effect."""
    tasks = {name: noise(layout, name, 80, seed) for name, seed in (("a", 3), ("b", 4))}
    generator = torch.Generator().manual_seed(9)
    for name in tasks["a"].gradients:
        shape = tasks["a"].gradients[name].shape[1:]
        direction = torch.randn(shape, generator=generator) * 2.5e-4
        tasks["a"].gradients[name] += direction
        tasks["b"].gradients[name] -= direction
    result = analysed(write_store(tmp_path / "run.fs", layout, tasks).store, margin=0.0)
    (row,) = result.extra["verdicts"].to_dict("records")
    whole = result.extra["levels"].query("level == 'whole'").iloc[0]
    assert -0.05 < whole["mean"] < -0.01
    assert (row["verdict"], row["pairs"], row["heads"]) == ("found", 0, 0)
    assert f"On average a and b oppose each other (mean cosine {whole['mean']:.3f})" in row["reason"]
    assert "These effects are small" in row["reason"]
    assert "Which pairs of samples are in conflict cannot be told" in row["reason"]


def test_where_memory_is_short_a_warning_says_what_was_looked_at(planted, monkeypatch):
    """Fewer heads are found under a small budget, and not in silence."""
    monkeypatch.setattr("fisherscope.analyses.conflict.head_tests._KEPT_BYTES", 1 << 20)
    result = analysed(planted.store)
    assert any("on heads only p-values up to" in note for note in result.warnings)


def test_samples_like_one_in_conflict_are_in_none_with_any_task(planted, layout, tmp_path):
    """With three tasks: what is offered as a pattern conflicts neither here nor there."""
    tasks = {**planted.tasks, "c": planted.tasks["b"].permuted([*range(6, 40), *range(6)])}
    result = analysed(write_store(tmp_path / "run.fs", layout, tasks).store, calibration_splits=0)
    calls = result.frame[result.frame["found"]]
    opposed = result.extra["samples"].query("direction < 0")["sample"]
    involved = {*calls["sample_a"], *calls["sample_b"], *opposed}
    offered = set(result.extra["augment"]["like"]) - {""}
    assert offered
    assert not offered & involved


def test_samples_that_took_no_part_weigh_one(planted):
    """Every id of the store has a weight, those beyond max_samples_per_task, too."""
    result = analysed(planted.store, max_samples_per_task=30, calibration_splits=0)
    weights = result.extra["reweight"].set_index("sample")["weight"]
    assert len(weights) == 80
    assert (weights[[f"a_{i}" for i in range(30, 40)]] == 1).all()
    assert len(result.files()["weights.jsonl"].splitlines()) == 80


def test_lists_for_windows_are_lists_of_samples(planted):
    """An order without repetition, and patterns that are samples."""
    result = analysed(planted.store, contribution_averaging_window=2, calibration_splits=0)
    assert result.extra["curriculum"]["order"].tolist() == list(range(80))
    known = {f"{t}_{i}" for t in "ab" for i in range(40)}
    for name in ("filter", "reweight", "curriculum", "augment"):
        assert set(result.extra[name]["sample"]) <= known
    assert set(result.extra["augment"]["like"]) <= known | {""}


def test_tests_that_were_not_tried_are_not_called_calibrated(layout, tmp_path):
    """Seven samples cannot be split: no verdict on the tests, and the reason says so."""
    tasks = {name: noise(layout, name, 7, seed) for name, seed in (("a", 3), ("b", 4))}
    result = analysed(write_store(tmp_path / "run.fs", layout, tasks).store)
    assert result.extra["calibration"]["calibrated"].isna().all()
    assert "not tried on random halves" in result.extra["verdicts"]["reason"].item()
    assert result.to_json()["tables"]["conflict_calibration"]["rows"][0][-2] is None
