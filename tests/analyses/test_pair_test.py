"""The pair test: symmetries, validity without conflict, what is planted is found, what it is built of."""

import numpy as np
import pytest
from scipy import stats

from fisherscope.analyses.conflict import adjust, pair_statistics, pair_test
from fisherscope.analyses.conflict.corroboration import corroboration
from fisherscope.analyses.conflict.tail import exceedances, fit_tail, tail_p_values
from fisherscope.analyses.conflict.within import Within
from tests.analyses.gradient_models import grams, plant, two_tasks, unit

PLANTED = [(i, 3 * i) for i in range(8)]


@pytest.fixture(scope="module")
def planted():
    return plant(*two_tasks(1, 30, 50), PLANTED)


def test_transposing_the_tasks_transposes_p(planted):
    """Neither task is the first one by nature."""
    cross, within_a, within_b = grams(*planted)
    p = pair_test(cross, within_a, within_b)
    assert p.shape == (30, 50)
    assert p.dtype == np.float64
    np.testing.assert_allclose(pair_test(cross.T, within_b, within_a).T, p, rtol=1e-6)


def test_lengths_of_gradients_do_not_matter(planted):
    """Only directions are tested: every sample may be rescaled, and the Grams need not be of unit vectors."""
    rng = np.random.default_rng(0)
    u, v = planted
    p = pair_test(*grams(u, v))
    scaled = grams(u * np.exp(rng.standard_normal((30, 1))), v * np.exp(rng.standard_normal((50, 1))))
    np.testing.assert_allclose(pair_test(*scaled), p, rtol=1e-6)


def test_permuting_samples_permutes_p(planted):
    """The order of the samples carries no information."""
    rng = np.random.default_rng(0)
    u, v = planted
    rows, columns = rng.permutation(30), rng.permutation(50)
    p = pair_test(*grams(u, v))
    np.testing.assert_allclose(pair_test(*grams(u[rows], v[columns])), p[np.ix_(rows, columns)], rtol=1e-6)


def test_one_task_split_at_random_gives_valid_p_values():
    """Super-uniform on A/A splits: P(p <= t) <= t, and BH rejects anything in at most 5 % of them.

    Exceedances are counted per split, since pairs of a split depend on each other; bounds are binomial, and
    three standard errors over splits.
    """
    shares, rejecting = [], 0
    levels = np.array([0.001, 0.01, 0.05, 0.2, 0.5])
    splits = 60
    for seed in range(splits):
        # tails without a variance: a fitted tail that is trusted blindly rejects here
        p = pair_test(*grams(*two_tasks(1000 + seed, 30, 30, df=1.5)))
        assert ((p > 0) & (p <= 1)).all()
        shares.append([(p <= level).mean() for level in levels])
        rejecting += bool((adjust(p) <= 0.05).any())
    shares = np.array(shares)
    error = shares.std(0, ddof=1) / np.sqrt(splits)
    assert (shares.mean(0) <= levels + 3 * error).all()
    assert stats.binomtest(rejecting, splits, 0.05, alternative="greater").pvalue > 0.01


@pytest.mark.parametrize("sizes", [(30, 30), (20, 60)])
def test_planted_pairs_are_found_and_little_else(sizes):
    """Strongly opposed pairs survive BH; of what survives, little is anything else."""
    found, false = 0, 0
    for seed in range(5):
        u, v = plant(*two_tasks(seed, *sizes), PLANTED)
        called = adjust(pair_test(*grams(u, v))) <= 0.05
        hits = sum(called[pair] for pair in PLANTED)
        found += hits
        false += called.sum() - hits
    assert found >= 0.9 * 5 * len(PLANTED)
    assert false <= 0.1 * found


def test_an_opposed_cluster_is_found():
    """Samples that agree within each task and oppose across are not drowned by their own agreement."""
    u, v = two_tasks(3, 80, 80)
    direction = unit(np.random.default_rng(5).standard_normal(u.shape[1]))
    u[:7] += 2 * direction
    v[:7] -= 2 * direction
    called = adjust(pair_test(*grams(u, v))) <= 0.05
    assert called[:7, :7].mean() > 0.8
    assert called.sum() - called[:7, :7].sum() <= 3


def test_coherent_but_unrelated_tasks_are_not_in_conflict():
    """Each task has a mean of its own, orthogonal to the other's: nothing is rejected."""
    u, v = two_tasks(4, 40, 40)
    means = np.linalg.qr(np.random.default_rng(5).standard_normal((u.shape[1], 2)))[0].T
    assert not (adjust(pair_test(*grams(u + means[0], v + means[1]))) <= 0.05).any()


def test_one_lone_pair_is_not_enough():
    """However far out it is: it could be the one coincidence of a heavy tail. Five independent ones are."""
    u, v = two_tasks(6, 40, 40)
    for count, expected in ((1, False), (3, False), (6, True)):
        statistics = pair_statistics(*grams(*plant(u, v, PLANTED[:count], strength=4)))
        assert statistics.corroborated == expected
        assert (adjust(statistics.p_values()) <= 0.05).any() == expected
        # the fitted tail alone would call every one of them
        assert (adjust(statistics.p_values(extrapolate=True)) <= 0.05).any()


def test_many_pairs_of_one_sample_count_once():
    """Nine extreme pairs of one sample are one piece of evidence."""
    n = 20
    values = -np.arange(100.0, 91.0, -1)
    hub = np.zeros(9, int)
    others = np.arange(9)
    assert corroboration(values, hub, n + others, n, n) < 2
    assert corroboration(values, others, n + others, n, n) > 20
    assert corroboration(values, others, 10 + others, n, n) == 1.0  # all within the first task


def test_corroboration_is_an_e_value():
    """Under random labels capital of 20 is reached with probability at most .05, whatever the values."""
    rng = np.random.default_rng(0)
    n_a, n_b, runs, reached = 12, 18, 2000, 0
    first, second = np.triu_indices(n_a + n_b, 1)
    for _ in range(runs):
        values = rng.standard_cauchy(len(first))
        low = np.argsort(values)[:60]
        label = rng.permutation(n_a + n_b)
        reached += corroboration(values[low], label[first[low]], label[second[low]], n_a, n_b) >= 20
    assert stats.binomtest(int(reached), runs, 0.05, alternative="greater").pvalue > 0.01


def test_reference_equals_a_slow_loop():
    """Centred, renormalised, scaled by each sample's negative cosines without the pair itself."""
    u, _ = two_tasks(7, 9, 4)
    found = Within.of(u @ u.T, "within_a")
    centred = u - u.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    r = centred @ centred.T
    n = len(r)
    negative = [[min(r[i, j], 0) if j != i else 0.0 for j in range(n)] for i in range(n)]

    def rms(values):
        below = [x for x in values if x < 0]
        return np.sqrt(sum(x * x for x in below) / len(below)) if below else 0.0

    pooled = rms([x for row in negative for x in row])
    np.testing.assert_allclose(found.pooled, pooled)
    for z, i, j in zip(found.scaled, found.first, found.second, strict=True):
        s_i = max(rms([x for k, x in enumerate(negative[i]) if k != j]), 0.3 * pooled)
        s_j = max(rms([x for k, x in enumerate(negative[j]) if k != i]), 0.3 * pooled)
        np.testing.assert_allclose(z, r[i, j] * pooled / (s_i * s_j), atol=1e-12)


def test_z_equals_its_formula(planted):
    """Cosines across, on the scales that the samples have within their own task."""
    cross, within_a, within_b = grams(*planted)
    statistics = pair_statistics(cross, within_a, within_b)
    a, b = Within.of(within_a, "a"), Within.of(within_b, "b")
    i, j = 4, 11
    z = cross[i, j] * np.sqrt(a.pooled * b.pooled) / (a.scale[i] * b.scale[j])
    np.testing.assert_allclose(statistics.z[i, j], z)
    row = np.sqrt(np.mean(cross[i][cross[i] > 0] ** 2))
    column = np.sqrt(np.mean(cross[:, j][cross[:, j] > 0] ** 2))
    mirrored = z * a.scale[i] * b.scale[j] / (max(a.scale[i], row) * max(b.scale[j], column))
    np.testing.assert_allclose(statistics.mirrored[i, j], mirrored)


def test_ranks_without_a_tail():
    """(1 + values at least as large) / (1 + total), also for ties and for values beyond all others."""
    reference = np.array([3.0, 1.0, 2.0, 2.0])
    x = np.array([[0.0, 2.0], [2.5, 9.0]])
    expected = np.array([[5, 4], [2, 1]]) / 5
    np.testing.assert_allclose(tail_p_values(reference, x, 4, extrapolate=False), expected)
    np.testing.assert_allclose(tail_p_values(reference, x, 4), expected)  # too few for a fit
    np.testing.assert_allclose(tail_p_values(reference, x, 9), np.array([[5, 4], [2, 1]]) / 10)


@pytest.mark.parametrize("shape", [0.0, 0.2, 0.4])
def test_tail_fit_recovers_a_pareto_tail(shape):
    """Shape, scale and far probabilities of generalised Pareto values; the shape stays in [0, 1/2]."""
    x = np.sort(stats.genpareto.rvs(shape, size=40_000, random_state=0))
    tail = fit_tail(x, len(x))
    assert tail.count == exceedances(len(x), len(x)) == 800
    assert abs(tail.shape - shape) < 0.12
    far = stats.genpareto.isf(1e-4, shape)
    found = tail_p_values(x, np.array([far]), len(x))
    assert 0.5e-4 < found[0] < 2.5e-4


def test_tail_meets_the_ranks_and_falls():
    """p never rises with the distance, jumps little at the threshold, and stays above 0."""
    x = np.sort(np.random.default_rng(1).standard_t(3, 5000))
    at = np.linspace(-5, 1e6, 20_001)
    p = tail_p_values(x, np.r_[at, 1e300], len(x))
    assert (np.diff(p) <= 1e-12).all()
    assert p.min() > 0
    tail = fit_tail(x, len(x))
    around = tail_p_values(x, np.nextafter(tail.threshold, [-np.inf, np.inf]), len(x))
    np.testing.assert_allclose(*around, rtol=0.02)


def test_few_samples_give_ranks_only():
    """Below about 15 samples there is no tail: p is at least 1 / (1 + reference pairs)."""
    u, v = plant(*two_tasks(8, 7, 7), [(i, i) for i in range(6)], strength=5)
    p = pair_test(*grams(u, v))
    assert p.min() >= 1 / (1 + 2 * 21)
    assert pair_test(*grams(*two_tasks(8, 4, 4))).shape == (4, 4)


def replaced(values, index, value):
    values = values.copy()
    values[index] = value
    return values


def test_errors_name_the_cause(planted):
    """NaN, shapes, too few samples, zero gradients, copies, matrices that do not belong together."""
    cross, within_a, within_b = grams(*planted)
    nan = replaced(cross, (2, 3), np.nan)
    with pytest.raises(ValueError, match=r"cross has 1 entries that are NaN.*\(2, 3\).*leave it out"):
        pair_test(nan, within_a, within_b)
    with pytest.raises(ValueError, match=r"within_a has shape \(50, 50\), but cross has shape \(30, 50\)"):
        pair_test(cross, within_b, within_a)
    with pytest.raises(ValueError, match="dimensions"):
        pair_test(cross[0], within_a, within_b)
    with pytest.raises(ValueError, match="within_a has 3 samples; the test needs at least 4"):
        pair_test(cross[:3], within_a[:3, :3], within_b)
    with pytest.raises(ValueError, match="at sample 7: without a gradient"):
        pair_test(cross, replaced(within_a, (7, 7), 0), within_b)
    with pytest.raises(ValueError, match="not symmetric"):
        pair_test(cross, replaced(within_a, (1, 2), 0.9), within_b)
    with pytest.raises(ValueError, match="cosine of 5"):
        pair_test(replaced(cross, (0, 0), 5.0), within_a, within_b)
    u, v = two_tasks(0, 6, 6)
    with pytest.raises(ValueError, match="within_b: the samples do not differ"):
        pair_test(*grams(u, np.repeat(v[:1], 6, 0)))
