"""Samples against another task: what counts as opposition, and what does not."""

import numpy as np
import pytest

from fisherscope.analyses.conflict.corroboration import sign_capital
from fisherscope.analyses.conflict.cosines import Blocks
from fisherscope.analyses.conflict.sample_tests import FEWEST_COLUMNS, samples_against_tasks


def sides_of(u, v, level=0.05, excess=0.01):
    vectors = np.concatenate([u, v])
    gram = (vectors @ vectors.T).astype(np.float32).astype(np.float64)
    return samples_against_tasks(Blocks(gram, len(u)), level, "bh", excess)


def noise(rng, n, d=200):
    return rng.normal(size=(n, d))


def test_samples_that_oppose_the_other_task_are_called():
    """Ten samples against what the other task shares: called, corroborated, and no others of their task."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=200)
    u, v = noise(rng, 60), noise(rng, 60) + 0.5 * shared
    u[:10] -= 0.6 * shared
    first, second = sides_of(u, v)
    assert (first.direction[:10] == -1).all()
    assert first.corroborated
    assert (first.direction[10:] == -1).sum() <= 20
    assert first.mean[:10].max() < -0.1
    assert not np.isnan(second.p).any()


def test_a_rare_label_opposes_everybody_and_that_is_no_conflict():
    """Random halves of one task of two labels: the rare one opposes both halves alike, and is not called."""
    called = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        direction = rng.normal(size=200)
        label = np.where(rng.random(80) < 0.7, 1.0, -0.7)
        vectors = noise(rng, 80) + label[:, None] * direction
        sides = sides_of(vectors[:40], vectors[40:])
        called += any((side.direction < 0).any() for side in sides)
        assert min(side.mean.min() for side in sides) < -0.1
    assert called <= 3


def test_unrelated_coherent_tasks_are_not_corroborated():
    """Each sample has some mean with the other task, to either side: called, but no sign of a conflict."""
    called = corroborated = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        means = np.zeros((2, 200))
        means[0, :100], means[1, 100:] = rng.normal(size=(2, 100))
        u, v = (noise(rng, 60) + mean for mean in means)
        sides = sides_of(u, v)
        called += any((side.direction < 0).any() for side in sides)
        corroborated += any(side.corroborated for side in sides)
    assert called > 30
    assert corroborated <= 6


@pytest.mark.parametrize("side", [0, 1])
def test_too_few_columns_are_not_tested(side):
    """A class of samples may be missing among them."""
    rng = np.random.default_rng(0)
    sizes = [60, FEWEST_COLUMNS - 1][:: 1 - 2 * side]
    for found in sides_of(noise(rng, sizes[0]), noise(rng, sizes[1])):
        assert np.isnan(found.p).all()
        assert (found.direction == 0).all()


def test_copies_of_one_sample_say_nothing():
    """Rows without spread, up to rounding, are not tested, and change no q of others."""
    rng = np.random.default_rng(0)
    copies = np.repeat(rng.normal(size=(1, 200)), 30, 0) * rng.uniform(0.5, 2, (30, 1))
    first, _ = sides_of(noise(rng, 40), copies)
    assert np.isnan(first.p).all()
    assert np.isnan(first.q).all()
    assert (first.direction == 0).all()


def test_least_excess_filters_calls_and_not_q():
    """Samples that are little below their own task's mean are not called."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=200)
    u, v = noise(rng, 60) - 0.3 * shared, noise(rng, 60) + 0.3 * shared
    loose, strict = sides_of(u, v, excess=0.0)[0], sides_of(u, v, excess=1.0)[0]
    assert (loose.direction < 0).sum() > 50
    assert (strict.direction >= 0).all()
    np.testing.assert_array_equal(loose.q, strict.q)


def test_six_signs_at_the_top_are_enough():
    """Bets of nine tenths of the capital, against fair coins: 47 after six, and rarely as much by chance."""
    assert sign_capital(np.ones(6, bool)) == pytest.approx(1.9**6)
    assert sign_capital(np.array([False, True])) == 1.0
    assert sign_capital(np.zeros(0, bool)) == 1.0
    rng = np.random.default_rng(0)
    assert np.mean([sign_capital(rng.random(100) < 0.5) >= 40 for _ in range(4000)]) <= 0.03
