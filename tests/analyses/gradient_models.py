"""Gradients of two tasks: heavy-tailed, of few effective dimensions, with planted conflicts or without."""

import numpy as np

D = 200


def unit(x):
    """Rows of length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def two_tasks(seed, n_a=40, n_b=40, df=3.0):
    """Unit gradients of two tasks from one population: a random split of one task."""
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((6, D))
    both = rng.standard_t(df, (n_a + n_b, D)) + 0.6 * rng.standard_t(df, (n_a + n_b, 6)) @ factors
    both = unit(both * np.exp(0.5 * rng.standard_normal(D)))
    return both[:n_a], both[n_a:]


def plant(u, v, pairs, strength=1.5, seed=99):
    """The gradients with these pairs opposed, each along a direction of its own."""
    u, v = u.copy(), v.copy()
    for (i, j), w in zip(
        pairs, unit(np.random.default_rng(seed).standard_normal((len(pairs), D))), strict=True
    ):
        u[i] += strength * w
        v[j] -= strength * w
    return unit(u), unit(v)


def grams(u, v):
    """Across, within the first, within the second."""
    return u @ v.T, u @ u.T, v @ v.T
