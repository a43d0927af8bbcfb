"""Checks of the matrices that the tests are given."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisherscope.errors import UsageError
from fisherscope.words import counted

Matrix = NDArray[np.float64]

# Samples with cosines above 1 - this are copies of each other, up to rounding.
_COPIES = 1e-5

# How far a Gram matrix may be from symmetric, and a cosine beyond 1: rounding of float32 products.
_ROUNDING = 1e-4


def differ(*within: Matrix) -> bool:
    """Whether the samples of each task are more than copies of one, by their cosines."""
    return all(cosines.min() < 1 - _COPIES for cosines in within)


def finite(name: str, values: ArrayLike, *, dimensions: tuple[int, ...]) -> Matrix:
    """The values as float64.

    Raises:
        ValueError: wrong number of dimensions, or NaN or infinite entries.
    """
    array = np.asarray(values, np.float64)
    if array.ndim not in dimensions:
        allowed = " or ".join(str(d) for d in dimensions)
        raise UsageError(f"{name} has shape {array.shape}; it must have {allowed} dimensions")
    if not (good := np.isfinite(array)).all():
        first = tuple(int(i) for i in np.argwhere(~good)[0])
        raise UsageError(
            f"{name} has {np.count_nonzero(~good)} entries that are NaN or infinite, the first at {first}: "
            "a sample without a gradient there has no cosines; leave it out and test the others"
        )
    return array


def unit_grams(
    cross: ArrayLike, within_a: ArrayLike, within_b: ArrayLike, *, least: int
) -> tuple[Matrix, Matrix, Matrix]:
    """Cosines across and within two tasks, from Gram matrices of any scale.

    Args:
        cross: ``[n_a, n_b]`` inner products across the tasks.
        within_a, within_b: ``[n_a, n_a]`` and ``[n_b, n_b]`` within each.
        least: samples that a task must have.

    Returns:
        The same, divided by the lengths of the vectors.

    Raises:
        ValueError: NaN, shapes that do not fit, too few samples, a sample without a gradient, a matrix that
            is not symmetric, or inner products larger than lengths allow.
    """
    across = finite("cross", cross, dimensions=(2,))
    within = []
    for name, values, n in (
        ("within_a", within_a, across.shape[0]),
        ("within_b", within_b, across.shape[1]),
    ):
        gram = finite(name, values, dimensions=(2,))
        if gram.shape != (n, n):
            raise UsageError(
                f"{name} has shape {gram.shape}, but cross has shape {across.shape}: it must be ({n}, {n})"
            )
        if n < least:
            raise UsageError(
                f"{name} has {counted(n, 'sample')}; the test needs at least {least} of each task"
            )
        within.append(_cosines(name, gram))
    (left, length_a), (right, length_b) = within
    across = across / length_a[:, None] / length_b
    if (largest := np.abs(across).max()) > 1 + _ROUNDING:
        raise UsageError(
            f"cross has a cosine of {largest:.3g} by the diagonals of within_a and within_b: the three "
            "matrices must be inner products of the same vectors"
        )
    return across, left, right


def _cosines(name: str, gram: Matrix) -> tuple[Matrix, Matrix]:
    squares = gram.diagonal()
    if (squares <= 0).any():
        first = int(np.argmin(squares > 0))
        raise UsageError(
            f"{name} has {squares[first]:.3g} on its diagonal at sample {first}: without a gradient there is "
            "no cosine; leave such samples out and test the others"
        )
    lengths = np.sqrt(squares)
    cosines = gram / lengths[:, None] / lengths
    if np.abs(cosines - cosines.T).max() > _ROUNDING:
        raise UsageError(f"{name} is not symmetric: it must hold the inner products u_i.u_j of one task")
    return cosines, lengths
