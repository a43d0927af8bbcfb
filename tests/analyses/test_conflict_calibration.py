"""Trying the tests on random halves of a task: what is counted, and when q-values are withheld."""

import json
import re

import numpy as np
import pytest
from scipy import stats

from fisherscope.analyses import AnalyzeConfig, ConflictConfig
from fisherscope.analyses.conflict import calibrate, cosines, pair_test
from fisherscope.analyses.conflict.calibration import Calibration, Verdict
from fisherscope.errors import NotStoredError
from tests.analyses.synthetic import make_task, write_store


def draw(counts=(30, 20), splits=10, level=0.05, seed=0):
    return Calibration.draw(counts, splits, level, "bh", np.random.default_rng(seed))


def gram(n=50, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(n, 40))
    return vectors @ vectors.T


def test_splits_are_disjoint_halves_of_one_task():
    """Tasks in turn; each half has half of the samples, none twice."""
    found = draw(counts=(30, 21))
    for number, half in enumerate(found.halves):
        first, second = set(half.first.tolist()), set(half.second.tolist())
        assert not first & second
        task = range(30) if number % 2 == 0 else range(30, 51)
        assert first | second == set(task)
        assert len(first) == len(task) // 2
    assert any(
        (a.first != b.first).any() for a, b in zip(found.halves[::2], found.halves[2::2], strict=False)
    )


def test_tasks_that_are_too_small_are_not_split():
    """Eight samples are needed; a task with fewer leaves the turns to the other, or nobody."""
    assert all(half.first.max() < 30 and half.second.max() < 30 for half in draw(counts=(30, 7)).halves)
    none = draw(counts=(7, 3))
    assert none.halves == []
    none.take_slice(gram(10), 0.0)
    none.take_whole(gram(10))
    assert [(v.splits, v.rejecting, v.calibrated) for v in none.verdicts()] == [(0, 0, None)] * 3
    assert "too few samples" in str(none.verdicts()[0])


@pytest.mark.parametrize(("rejecting", "calibrated"), [(0, True), (3, True), (4, False), (20, False)])
def test_so_many_rejections_are_chance_or_not(rejecting, calibrated):
    """P(Bin(20, .05) >= k) against .05: three may be chance, four are not."""
    verdict = Verdict("pairs", 20, rejecting, 0.05, 10)
    expected = sum(stats.binom.pmf(k, 20, 0.05) for k in range(rejecting, 21))
    np.testing.assert_allclose(verdict.chance, expected)
    assert verdict.calibrated == calibrated
    assert ("withheld" in str(verdict)) == (not calibrated)
    assert f"{rejecting} of 20 random splits" in str(verdict)


def test_p_values_are_those_of_the_pair_test_on_halves():
    """The histogram holds every pair of every split."""
    found, matrix = draw(splits=4), gram()
    found.take_whole(matrix)
    cosine = cosines(matrix)
    expected = np.concatenate(
        [
            pair_test(
                cosine[np.ix_(h.first, h.second)],
                cosine[np.ix_(h.first, h.first)],
                cosine[np.ix_(h.second, h.second)],
            ).ravel()
            for h in found.halves
        ]
    )
    table = found.histogram().query("test == 'pairs'")
    counts, _ = np.histogram(expected, bins=np.linspace(0, 1, 21))
    assert table["count"].tolist() == counts.tolist()
    np.testing.assert_allclose(table["high"] - table["low"], 0.05)


def test_a_split_that_rejects_is_counted():
    """Opposed halves put together as one task: where a split happens to separate them, the test says so."""
    generator = np.random.default_rng(1)
    directions = generator.normal(size=(30, 300))
    vectors = generator.normal(size=(60, 300)) * 0.05 + np.concatenate([directions, -directions])
    found = Calibration.draw((60,), 1, 0.05, "bh", generator)
    from fisherscope.analyses.conflict.calibration import Half

    found.halves[0] = Half(np.arange(30), np.arange(30, 60))
    found.take_whole(vectors @ vectors.T)
    assert found.verdicts()[0].rejecting == 1


def test_slices_are_combined_for_heads_and_listed_for_blocks():
    """Heads: one p per pair over all slices, on half of the splits. Blocks: one p per slice."""
    found = draw(counts=(40,), splits=6)
    for seed in range(5):
        found.take_slice(gram(40, seed), 0.0)
    counts = found.histogram().groupby("test")["count"].sum()
    assert counts["blocks"] == 6 * 5
    assert counts["heads"] == 3 * 20 * 20
    assert {v.test: v.splits for v in found.verdicts()} == {"pairs": 0, "heads": 3, "blocks": 6}


def test_samples_without_gradient_are_left_out_of_a_half():
    """Their cosines are undefined; the others are tested."""
    matrix = gram(40)
    matrix[3], matrix[:, 3] = 0, 0
    found = draw(counts=(40,), splits=2)
    found.take_whole(matrix)
    found.take_slice(matrix, 0.0)
    assert found.histogram().query("test == 'pairs'")["count"].sum() == 2 * 19 * 20


def test_random_tasks_are_calibrated(made):
    """A/A on single tasks of a store, with as many splits as asked for; the smaller one says its size."""
    found = calibrate(made.store, splits=40)
    assert found.calibrated
    assert set(found.frame["task"]) == {"math", "code"}
    assert found.frame.groupby("test")["splits"].unique().map(list).to_dict() == {
        "pairs": [40],
        "heads": [20],
        "blocks": [40],
    }
    assert found.frame.set_index(["task", "test"]).loc[("code", "pairs"), "samples"] == 4
    assert "0 of 40 splits" in found.summary()
    assert "no proof" in found.summary()
    json.dumps(found.to_json(), allow_nan=False)
    again = calibrate(made.store.path, splits=40)
    assert again.frame.equals(found.frame)


def test_one_task_is_enough(made, layout, tmp_path, capsys):
    """Unlike conflict itself; tasks can be chosen, and samples limited."""
    store = write_store(tmp_path / "run.fs", layout, {"a": make_task(layout, "a", 20, 3)}).store
    capsys.readouterr()
    found = calibrate(store, splits=5)
    assert re.fullmatch(r"calibrate a: \d+\.\d s\n", capsys.readouterr().err)
    calibrate(store, splits=5, quiet=True)
    assert capsys.readouterr().err == ""
    assert found.frame["samples"].tolist() == [10, 10, 10]
    config = AnalyzeConfig(tasks=("code",), conflict=ConflictConfig(max_samples_per_task=8, margin=0.1))
    assert calibrate(made.store, config, splits=2).frame["task"].unique().tolist() == ["code"]


def test_too_few_samples_cannot_be_split(layout, tmp_path):
    """Said for what it is: not tried."""
    store = write_store(tmp_path / "run.fs", layout, {"a": make_task(layout, "a", 5, 3)}).store
    found = calibrate(store, splits=5)
    assert found.frame["splits"].tolist() == [0, 0, 0]
    assert "not tried, too few samples" in found.summary()
    assert found.calibrated


def test_what_calibrate_refuses(made, bare):
    """No gradients, no splits, no such task."""
    with pytest.raises(NotStoredError, match="sample gradients"):
        calibrate(bare.store)
    with pytest.raises(ValueError, match="splits is 0"):
        calibrate(made.store, splits=0)
    with pytest.raises(ValueError, match="no task 'x'"):
        calibrate(made.store, AnalyzeConfig(tasks=("x",)))
