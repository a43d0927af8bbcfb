"""The inverse of a damped Fisher matrix in the Gram matrix of its samples, against a dense inverse."""

import numpy as np
import pytest

from fisherscope.linalg.woodbury import DampedFisher, between, without_pair

SIZE = 40


def rows(n, seed, size=SIZE):
    """Samples with a spectrum that falls steeply."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, size)) * np.exp(-np.arange(size) / 6) @ rng.normal(size=(size, size)) * 1e-4


def dense(h, weights, lam):
    """F^-1 entry by entry."""
    fisher = lam * np.eye(h.shape[1])
    for row, weight in zip(h, weights, strict=True):
        fisher += weight * np.outer(row, row)
    return np.linalg.inv(fisher)


def damping(h, weights):
    values = np.linalg.eigvalsh((h * np.sqrt(weights)[:, None]) @ (h * np.sqrt(weights)[:, None]).T)
    return 0.1 * values[values > 1e-12 * values.max()].mean()


def close(found, expected):
    """Relative to the largest entry."""
    assert np.abs(found - expected).max() <= 1e-8 * np.abs(expected).max()


@pytest.mark.parametrize("n", [1, 7, 60])
def test_within_a_mean_equals_a_dense_inverse(n):
    """n K (K + n lam I)^-1, with fewer and with more samples than entries: 1e-8."""
    h = rows(n, 0)
    weights = np.full(n, 1 / n)
    lam = damping(h, weights)
    close(between(h @ h.T, lam), h @ dense(h, weights, lam) @ h.T)


def test_across_equals_a_dense_inverse():
    """n_A (K_AA + n_A lam)^-1 K_AB: F of A's samples alone, B's are others and of another number."""
    a, b = rows(9, 1), rows(14, 2)
    weights = np.full(9, 1 / 9)
    lam = damping(a, weights)
    close(between(a @ a.T, lam, a @ b.T), a @ dense(a, weights, lam) @ b.T)


def test_pooled_unequal_numbers_equal_a_dense_inverse():
    """Weights that give two tasks half of F each, whatever their numbers of samples."""
    h = np.concatenate([rows(6, 3), rows(15, 4)])
    weights = np.repeat([1 / 12, 1 / 30], [6, 15])
    lam = damping(h, weights)
    fisher = DampedFisher.of(h @ h.T, weights, SIZE)
    np.testing.assert_allclose(0.1 * fisher.mean_eigenvalue, lam, rtol=1e-9)
    close(fisher.within(lam), h @ dense(h, weights, lam) @ h.T)


def test_leaving_a_pair_out_equals_a_dense_inverse_for_each_pair():
    """All pairs at once, against one inverse per pair without its two terms: 1e-8."""
    h, weights = rows(12, 5), np.repeat([0.05, 0.11], 6)
    lam = damping(h, weights)
    inside = DampedFisher.of(h @ h.T, weights, SIZE).within(lam)
    first, second = slice(0, 6), slice(6, 12)
    own = inside.diagonal()
    found = without_pair(inside[first, second], own[first], own[second], 0.05, 0.11)
    for i in range(6):
        for j in range(6, 12):
            kept = [k for k in range(12) if k not in (i, j)]
            expected = h[i] @ dense(h[kept], weights[kept], lam) @ h[j]
            assert abs(found[i, j - 6] - expected) <= 1e-8 * np.abs(found).max()


def test_leaving_a_pair_out_of_tasks_of_unequal_size():
    """Pooled, 5 and 13 samples: F of the other samples, each task's mean over those that are left."""
    a, b = rows(5, 8), rows(13, 9)
    h, weights = np.concatenate([a, b]), np.repeat([1 / 8, 1 / 24], [5, 13])
    lam = damping(h, weights)
    inside = DampedFisher.of(h @ h.T, weights, SIZE).within(lam)
    own = inside.diagonal()
    found = without_pair(inside[:5, 5:], own[:5], own[5:], 1 / 8, 1 / 24)
    expected = np.empty((5, 13))
    for i in range(5):
        for j in range(13):
            left = np.concatenate([np.delete(a, i, 0), np.delete(b, j, 0)])
            # 1 / 2 of the mean over 4 and of that over 12
            expected[i, j] = a[i] @ dense(left, np.repeat([1 / 8, 1 / 24], [4, 12]), lam) @ b[j]
    close(found, expected)


def test_leaving_a_sample_out_where_the_other_is_not_in_fisher():
    """F of A's samples alone without sample i, against samples of B, which it never had."""
    a, b = rows(7, 10), rows(11, 11)
    weights = np.full(7, 1 / 6)
    lam = damping(a, weights)
    fisher = DampedFisher.of(a @ a.T, weights, SIZE)
    found = without_pair(fisher.across(a @ b.T, lam), fisher.within(lam).diagonal(), np.zeros(11), 1 / 6, 0.0)
    expected = [a[i] @ dense(np.delete(a, i, 0), np.full(6, 1 / 6), lam) @ b.T for i in range(7)]
    close(found, np.array(expected))


def test_leaving_a_pair_of_one_task_out():
    """A task with itself: F of the n - 2 other samples."""
    h, weights = rows(9, 12), np.full(9, 1 / 7)
    lam = damping(h, weights)
    inside = DampedFisher.of(h @ h.T, weights, SIZE).within(lam)
    found = without_pair(inside, inside.diagonal(), inside.diagonal(), 1 / 7, 1 / 7)
    for i in range(9):
        for j in range(9):
            if i != j:
                kept = np.delete(h, [i, j], 0)
                expected = h[i] @ dense(kept, np.full(7, 1 / 7), lam) @ h[j]
                assert abs(found[i, j] - expected) <= 1e-8 * np.abs(inside).max()


def test_rank_and_eigenvalues_ignore_rounding():
    """Copies of a sample and more samples than entries add no eigenvalue."""
    h = rows(5, 6)
    twice = np.concatenate([h, h])
    fisher = DampedFisher.of(twice @ twice.T, np.full(10, 0.1), SIZE)
    assert fisher.rank == 5
    values = np.linalg.eigvalsh(h @ h.T / 5)
    np.testing.assert_allclose(fisher.mean_eigenvalue, values.mean(), rtol=1e-9)
    np.testing.assert_allclose(fisher.smallest_eigenvalue, values[0], rtol=1e-6)


def test_samples_without_gradients_give_zeros():
    """No eigenvalue, no inverse: zeros, whatever the damping."""
    fisher = DampedFisher.of(np.zeros((4, 4)), np.full(4, 0.25), SIZE)
    assert (fisher.rank, fisher.mean_eigenvalue, fisher.smallest_eigenvalue) == (0, 0.0, 0.0)
    np.testing.assert_array_equal(fisher.within(1e-30), 0)


def test_little_damping_in_sample_tells_nothing():
    """Far below the smallest eigenvalue the values are n times the identity, whatever the samples."""
    h = rows(6, 7)
    np.testing.assert_allclose(between(h @ h.T, 1e-24), 6 * np.eye(6), atol=1e-6)


def test_what_does_not_fit_is_refused():
    """Shapes, weights and damping are checked, and named."""
    with pytest.raises(ValueError, match="must be square"):
        DampedFisher.of(np.zeros((3, 3)), np.ones(2), 4)
    with pytest.raises(ValueError, match="weights positive"):
        DampedFisher.of(np.zeros((2, 2)), np.zeros(2), 4)
    with pytest.raises(ValueError, match="finite"):
        DampedFisher.of(np.full((2, 2), np.nan), np.ones(2), 4)
    with pytest.raises(ValueError, match="damping must be > 0"):
        between(np.eye(2), 0.0)
