"""Sample, block and group tests, and corrections, against slow loops and other libraries."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from fisherscope.analyses.conflict import (
    adjust,
    adjust_directional,
    block_test,
    cauchy_combination,
    e_bh,
    e_values,
    group_test,
    pair_test,
    sample_test,
)
from tests.analyses.gradient_models import grams, plant, two_tasks, unit


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def cross(rng):
    """Cosines with effects of rows and of columns."""
    return 0.1 * (rng.standard_normal((9, 13)) + rng.standard_normal((9, 1)) + rng.standard_normal(13))


def test_sample_test_is_students_t_along_rows(cross):
    """One-sided, n_b - 1 degrees of freedom; for several slices at once; multiples change nothing."""
    expected = stats.ttest_1samp(cross, 0, axis=1, alternative="less").pvalue
    np.testing.assert_allclose(sample_test(cross), expected)
    stacked = np.stack([cross, -cross])
    np.testing.assert_allclose(sample_test(stacked), [expected, 1 - expected])
    np.testing.assert_allclose(sample_test(7 * cross), expected)


def test_sample_test_finds_the_samples_that_oppose_a_coherent_task():
    """Three samples against what the other task shares; the rest are not called."""
    u, v = two_tasks(1, 40, 40)
    direction = unit(np.random.default_rng(2).standard_normal(u.shape[1]))
    u[:3] -= direction
    cross, _, _ = grams(unit(u), unit(v + 0.7 * direction))
    q, sign = adjust_directional(sample_test(cross))
    assert ((q <= 0.05) & (sign < 0))[:3].all()
    assert ((q <= 0.05) & (sign < 0)).sum() <= 5


def test_sample_test_without_conflict():
    """Symmetric populations: BH rejects any sample in at most 5 % of the splits, within binomial error."""
    rejecting = sum(
        bool((adjust(sample_test(grams(*two_tasks(seed, 25, 25))[0])) <= 0.05).any()) for seed in range(100)
    )
    assert stats.binomtest(rejecting, 100, 0.05, alternative="greater").pvalue > 0.01


def slow_block_test(cross, margin):
    n_a, n_b = cross.shape
    mean = sum(cross[i, j] for i in range(n_a) for j in range(n_b)) / (n_a * n_b)
    row = column = cell = 0.0
    for i in range(n_a):
        row += sum(cross[i, j] - mean for j in range(n_b)) ** 2
    for j in range(n_b):
        column += sum(cross[i, j] - mean for i in range(n_a)) ** 2
    for i in range(n_a):
        for j in range(n_b):
            cell += (cross[i, j] - mean) ** 2
    row, column = row * n_a / (n_a - 1), column * n_b / (n_b - 1)
    variance = max(row + column - cell, row, column) / (n_a * n_b) ** 2
    t = (mean + margin) / np.sqrt(variance)
    return t, stats.t.cdf(t, min(n_a, n_b) - 1)


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_block_test_equals_a_slow_loop(cross, margin):
    """Two-way clustered, alone and stacked; transposing changes nothing; a margin makes rejecting harder."""
    expected = slow_block_test(cross, margin)
    np.testing.assert_allclose(block_test(cross, margin=margin), expected)
    np.testing.assert_allclose(block_test(cross.T, margin=margin), expected)
    others = np.stack([cross, 2 * cross - 0.1])
    t, p = block_test(others, margin=np.array([margin, 0.0]))
    assert t.shape == p.shape == (2,)
    np.testing.assert_allclose([t[0], p[0]], expected)
    np.testing.assert_allclose([t[1], p[1]], slow_block_test(others[1], 0.0))


def test_block_test_holds_where_pairs_share_samples(rng):
    """Rows and columns with effects of their own: the level is kept; with independent pairs it is far off."""
    runs, found, naive = 300, 0, 0
    for _ in range(runs):
        x = rng.standard_normal((15, 1)) + rng.standard_normal((1, 15)) + rng.standard_normal((15, 15))
        found += block_test(x)[1] <= 0.05
        naive += stats.ttest_1samp(x.ravel(), 0, alternative="less").pvalue <= 0.05
    assert stats.binomtest(int(found), runs, 0.05, alternative="greater").pvalue > 0.01
    assert naive > 0.2 * runs


def test_degenerate_cosines_give_no_evidence():
    """Rows without spread are copies, not independent draws: p = 1; and p is never 0."""
    assert (sample_test(np.full((2, 5), -0.3)) == 1).all()
    assert [float(x) for x in block_test(np.full((4, 5), -0.3))] == [0.0, 1.0]
    tight = -1 + 1e-9 * np.random.default_rng(0).standard_normal((300, 300))
    assert (sample_test(tight) > 0).all()
    assert block_test(tight)[1] > 0


def test_bh_and_by_equal_statsmodels(rng):
    """In any shape; also for ties, 0 and 1."""
    p = np.concatenate([rng.uniform(size=40) ** 3, [0.0, 1.0, 0.01, 0.01]]).reshape(4, 11)
    for method, name in (("bh", "fdr_bh"), ("by", "fdr_by")):
        expected = multipletests(p.ravel(), method=name)[1].reshape(p.shape)
        np.testing.assert_allclose(adjust(p, method), expected)
    assert adjust(np.empty((0, 3))).shape == (0, 3)


def test_e_bh_equals_its_definition(rng):
    """Rejects the largest k with k e_(k) >= m / level, by a loop over k."""
    e = rng.pareto(0.6, size=(5, 8))
    for level in (0.05, 0.2, 0.5):
        ordered = np.sort(e.ravel())[::-1]
        k = max((k for k in range(1, 41) if k * ordered[k - 1] >= 40 / level), default=0)
        assert (e_bh(e) <= level).sum() == k
    assert (e_bh(np.zeros(3)) == 1).all()


def test_e_values_have_mean_one_and_fall(rng):
    """A calibrator integrates to 1 over uniform p, by quadrature, and never rises with p."""
    log = np.linspace(np.log(1e-13), 0, 400_001)
    p = np.exp(log)
    e = e_values(p)
    # what lies below the first point: (1 - p) / (p ln^2 p) ~ d/dp (-1 / ln p)
    rest = -1 / log[0]
    np.testing.assert_allclose(np.trapezoid(e * p, log) + rest, 1, atol=2e-3)
    assert (np.diff(e) <= 1e-9).all()
    assert e_values(0.0) == np.inf
    np.testing.assert_allclose(e_values(1.0), 0.5)
    np.testing.assert_allclose(e_values(1 - 2e-4), 0.5 + 2e-4 / 6, rtol=1e-6)


def test_direction_is_called_by_the_smaller_side():
    """Two-sided p, and -1 below, 1 above."""
    q, sign = adjust_directional(np.array([0.001, 0.999, 0.4]))
    np.testing.assert_allclose(q, multipletests([0.002, 0.002, 0.8], method="fdr_bh")[1])
    assert sign.tolist() == [-1, 1, -1]


def test_cauchy_combination_equals_its_formula(rng):
    """By tangent and arctangent; equal p are kept; tiny ones survive; a single 1 does not outweigh them."""
    p = rng.uniform(0.001, 0.98, (6, 3, 2))
    total = np.tan((0.5 - p) * np.pi).mean(0)
    np.testing.assert_allclose(cauchy_combination(p), 0.5 - np.arctan(total) / np.pi)
    np.testing.assert_allclose(cauchy_combination(np.full((4, 2), 0.03)), 0.03)
    np.testing.assert_allclose(cauchy_combination([1e-200, 0.5, 0.5, 0.5]), 4e-200)
    assert cauchy_combination([1e-6, 1.0]) < 1e-5
    np.testing.assert_allclose(cauchy_combination(p, axis=1), cauchy_combination(p.swapaxes(0, 1)))


def test_groups_inside_selected_pairs_equal_a_loop(rng):
    """Pairs by BH over Cauchy-combined p; groups by BH inside each at level R / m."""
    p = rng.uniform(size=(5, 6, 7))
    p[:2, 1, 2] = p[3, 4, 4] = 1e-6
    result = group_test(p, level=0.1)
    np.testing.assert_allclose(result.q, adjust(cauchy_combination(p)))
    level = 0.1 * result.selected.sum() / 42
    np.testing.assert_allclose(result.within_level, level)
    for i in range(6):
        for j in range(7):
            q = multipletests(p[:, i, j], method="fdr_bh")[1]
            np.testing.assert_allclose(result.within_q[:, i, j], q)
            expected = (q <= level) & result.selected[i, j]
            np.testing.assert_array_equal(result.rejected[:, i, j], expected)
    assert result.rejected[:2, 1, 2].all()
    assert result.rejected[3, 4, 4]
    assert not group_test(np.full((5, 6, 7), 0.5)).rejected.any()


def test_the_right_group_is_found():
    """A conflict that is planted in one of four groups is called there."""
    pairs = [(i, i) for i in range(8)]
    groups = [two_tasks(seed, 30, 30) for seed in range(4)]
    groups[2] = plant(*groups[2], pairs, strength=3)
    result = group_test(np.stack([pair_test(*grams(u, v)) for u, v in groups]))
    assert sum(result.rejected[2][pair] for pair in pairs) >= 7
    assert not result.rejected[[0, 1, 3]].any()


def test_errors_name_the_cause():
    """NaN, wrong shapes, too few samples, impossible margins, levels, methods and p-values."""
    good = np.zeros((4, 5))
    nan = np.full((4, 5), np.nan)
    for test in (sample_test, block_test):
        with pytest.raises(ValueError, match="20 entries that are NaN or infinite"):
            test(nan)
        with pytest.raises(ValueError, match="dimensions"):
            test(good[0])
    with pytest.raises(ValueError, match="with 1 sample of the other task"):
        sample_test(good[:, :1])
    with pytest.raises(ValueError, match="at least 2 samples of each task"):
        block_test(good[:1])
    with pytest.raises(ValueError, match="margin"):
        block_test(good, margin=-0.1)
    for function in (adjust, e_values, cauchy_combination, adjust_directional):
        for bad in (nan, good - 0.1, good + 1.1):
            with pytest.raises(ValueError, match="p-values"):
                function(bad)
    with pytest.raises(ValueError, match="method is 'holm'; it must be one of bh, by, ebh"):
        adjust(good, "holm")
    with pytest.raises(ValueError, match="e-values"):
        e_bh(-np.ones(3))
    with pytest.raises(ValueError, match="no p-values to combine"):
        cauchy_combination(np.empty((0, 3)))
    with pytest.raises(ValueError, match="level is 1"):
        group_test(np.zeros((2, 3, 3)), level=1)
    with pytest.raises(ValueError, match="3 dimensions"):
        group_test(good)


def test_the_example_of_the_documentation():
    """The code of docs/statistics.md runs, and calls the eight pairs that it plants."""
    page = Path(__file__).resolve().parents[2] / "docs" / "statistics.md"
    names = {}
    exec(re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1], names)
    assert names["conflicts"].tolist() == [[k, k] for k in range(8)]
