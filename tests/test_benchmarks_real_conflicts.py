"""The benchmark on real gradients runs in its small form, keeps its bars, and counts what it says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fisherscope import demo
from fisherscope.analyses import AnalyzeConfig
from fisherscope.analyses.conflict import calibrate, pair_test

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
OWN = ["bars", "demo_answers", "harness", "naive_tests", "real_conflicts", "trained_gpt2"]


@pytest.fixture(scope="module")
def real():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import real_conflicts

        yield real_conflicts
        for name in OWN:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def results(real, tmp_path_factory):
    """Rows by setting and variant, of what was written as JSON."""
    out = tmp_path_factory.mktemp("real") / "results.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["real_conflicts.py", "--smoke", "--splits", "20", "--json", str(out)])
        real.main()
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return {(row["setting"], row["variant"]): row for row in rows}


@pytest.mark.slow
def test_bars_are_kept(results):
    """Random halves stay within chance, half of the twins are called, and no pair of math against code."""
    assert [key for key, row in results.items() if not row["ok"]] == []
    bars = {key: row for key, row in results.items() if row["bar"]}
    splits = [key for key in bars if key[1].startswith("splits")]
    # three tests on three tasks of the demo and two of GPT-2
    assert len(splits) == 3 * 5
    assert all("20 random halves" in setting for setting, _ in splits)
    # the test of heads is tried on half of them
    told = [row["bar"] for key, row in bars.items() if key in splits]
    assert sorted(told) == ["0, at most 2 of 10"] * 5 + ["0, at most 3 of 20"] * 10
    assert results["math against math_flipped, natural, 48 samples each", "recall of twins"]["ratio"] >= 0.5
    assert results["math against code, natural, 48 samples each", "T1: pairs called"]["ratio"] == 0
    assert len(bars) == 3 * 5 + 2


@pytest.mark.slow
def test_naive_tests_call_what_is_not_there(results):
    """Beside them, the tests that take directions for random call a share of pairs in random halves."""
    naive = {key[0]: row["ratio"] for key, row in results.items() if "cos sqrt(d)" in key[1]}
    assert len(naive) == 5
    assert max(naive.values()) > 0.1


def test_the_gate_is_that_of_the_analysis(real):
    """The most rejecting splits of which P(Bin(R, .05) >= k) is still .05."""
    assert [real.most(splits) for splits in (10, 20, 40)] == [2, 3, 4]


def test_splits_and_gradients_are_those_of_the_analysis(real):
    """The pair test on the gradients and halves made here gives the p-values that ``calibrate`` counts."""
    with real.demo(24) as store:
        config = AnalyzeConfig(tasks=("math",), seed=3)
        counted = calibrate(store, config, splits=5).extra["p"]
        gradients = real.natural(store, "math").astype(np.float64)
        p = []
        for half in real.halves_of(store, "math", 5, config).halves:
            u, v = gradients[half.first], gradients[half.second]
            p.append(pair_test(u @ v.T, u @ u.T, v @ v.T))
    counts, _ = np.histogram(np.concatenate(p), bins=20, range=(0, 1))
    pairs = counted[counted["test"] == "pairs"]["count"].to_numpy()
    assert counts.sum() == 5 * 12 * 12
    # float32 Gram matrices there: a p-value may lie on the other side of an edge
    assert np.abs(np.cumsum(counts - pairs)).max() <= 3


def test_twins_stand_in_the_same_row_and_share_their_answer(real):
    """Rows of math and math_flipped are planted pairs; what is shared is counted digit by digit."""
    from demo_answers import in_place, rows_of, shared

    rows, n = rows_of(30), 30
    assert [row["prompt"] for row in rows["math"]] == [row["prompt"] for row in rows["math_flipped"]]
    assert len(demo.planted_pairs()) > n
    common = shared(n)
    twins = np.arange(n)
    assert common["the answer"][twins, twins].all()
    assert common["an operand"][twins, twins].all()
    assert not common["all digits but one"][twins, twins].any()
    assert [in_place("136", b) for b in ("136", "13", "163", "36", "901")] == [3, 2, 1, 0, 0]
    answers = [row["completion"].strip() for row in rows["math"]]
    for i in range(n):
        for j in range(n):
            a, b = answers[i], answers[j]
            assert common["the answer"][i, j] == (a == b)
            assert common["places"][i, j] == in_place(a, b)
            assert common["a digit of the answer in place"][i, j] == (in_place(a, b) > 0)


def test_the_small_model_is_seeded_and_its_tasks_are_what_they_say(real):
    """The same seed gives the same samples and losses; copies are copies, sums are sums, samples differ."""
    from trained_gpt2 import trained

    first, again = (trained(1, 12, steps=3) for _ in range(2))
    assert first.tasks == again.tasks
    assert first.losses == again.losses
    for row in first.tasks["copy"]:
        ids = row["input_ids"]
        assert ids[:4] == ids[5:] == row["labels"][5:]
    for row in first.tasks["modular"]:
        a, b, c, total = (row["input_ids"][k] for k in (0, 2, 4, 6))
        assert total == (a + b + c) % 8
        assert row["labels"] == [-100] * 6 + [total]
    for rows in first.tasks.values():
        assert len({tuple(row["input_ids"]) for row in rows}) == 12
