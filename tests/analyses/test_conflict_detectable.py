"""The cosine that would have been called: pairs planted there are."""

import numpy as np
import pytest

from fisherscope.analyses.conflict import adjust, pair_statistics, pair_test
from fisherscope.analyses.conflict.detectable import detectable_cosine


def units(rng, n, kind):
    if kind == "gauss":
        vectors = rng.standard_normal((n, 300))
    else:
        shared = np.random.default_rng(5).standard_normal((6, 300))
        vectors = rng.standard_t(3, (n, 300)) + 0.6 * rng.standard_t(3, (n, 6)) @ shared
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(("kind", "least"), [("gauss", 0.7), ("heavy", 0.55)])
def test_most_pairs_planted_there_are_called(kind, least):
    """About four of five, of 0.3 % of all pairs; fewer where planted pairs widen heavy tails themselves."""
    called, weaker = [], []
    for seed in range(12):
        rng = np.random.default_rng([seed, 100])
        u, v = units(rng, 100, kind), units(rng, 100, kind)
        cosine = detectable_cosine(u @ v.T, pair_statistics(u @ v.T, u @ u.T, v @ v.T), 0.05)
        if np.isnan(cosine):
            continue
        for planted, found in ((cosine, called), (cosine / 2, weaker)):
            w = v.copy()
            for k in range(30):
                rest = v[k] - (v[k] @ u[k]) * u[k]
                w[k] = planted * u[k] + np.sqrt(1 - planted**2) * rest / np.linalg.norm(rest)
            q = adjust(pair_test(u @ w.T, u @ u.T, w @ w.T))
            found.append((np.diag(q)[:30] <= 0.05).mean())
    assert len(called) > 5
    assert np.mean(called) > least
    assert np.mean(weaker) < 0.3


def test_nothing_can_be_called_of_few_samples():
    """NaN: not even a cosine of -1."""
    rng = np.random.default_rng(0)
    u, v = units(rng, 5, "gauss"), units(rng, 5, "gauss")
    assert np.isnan(detectable_cosine(u @ v.T, pair_statistics(u @ v.T, u @ u.T, v @ v.T), 0.05))
    zero = np.zeros((5, 5))
    assert np.isnan(detectable_cosine(zero, pair_statistics(u @ v.T, u @ u.T, v @ v.T), 0.05))
