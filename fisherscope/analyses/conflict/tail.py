"""Probabilities far out in a tail, from a sample of values: ranks, then a generalised Pareto distribution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

Values = NDArray[np.float64]

# Exceedances that a fit takes: this share of the whole, but at least so many where this is at most a tenth.
SHARE = 0.02
_LEAST, _WANTED, _LARGEST_SHARE = 20, 30, 0.1
# Shapes outside are set to the nearest end: below 0 the tail would end at a point that the next sample may
# pass; above 1/2 it has no variance, and cosines are bounded.
_SHAPES = (0.0, 0.5)
_SMALLEST = 1e-300


@dataclass(frozen=True)
class Tail:
    """Upper tail of a distribution, fitted to the ``count`` largest of ``total`` values.

    ``P(X > x) = (count / total) (1 + shape (x - threshold) / scale)^(-1 / shape)`` beyond the threshold:
    Pickands (1975), Balkema and de Haan (1974).

    Attributes:
        threshold: the largest value that is not an exceedance.
        shape, scale: of the generalised Pareto distribution; shape 0 is the exponential.
        count: exceedances.
        total: values among which they are the largest.
    """

    threshold: float
    shape: float
    scale: float
    count: int
    total: int

    def probability(self, x: Values) -> Values:
        """P(X > x) for x beyond the threshold."""
        excess = (x - self.threshold) / self.scale
        log = -excess if self.shape == 0 else -np.log1p(self.shape * excess) / self.shape
        return np.asarray(self.count / self.total * np.exp(log))


def exceedances(known: int, total: int) -> int:
    """How many of the largest values a fit takes; 0 where there are too few for any.

    Args:
        known: values there are.
        total: values among which they are counted (see :func:`tail_p_values`).
    """
    count = min(max(round(SHARE * total), _WANTED), int(_LARGEST_SHARE * total), known // 2)
    return count if count >= _LEAST else 0


def fit_tail(ascending: Values, total: int) -> Tail | None:
    """The tail of sorted values; None where there are too few, or the largest are all the same.

    The shape is the larger one of two fits, to all exceedances and to the farther half of them: a mixture
    of many ordinary values and few that come from far out has a tail that gets heavier on the way, and one
    fit to all would follow the many.
    """
    if not (count := exceedances(len(ascending), total)):
        return None
    threshold = float(ascending[-count - 1])
    excess = ascending[-count:] - threshold
    if not excess.mean() > 0:
        return None
    shape, scale = _fit(excess)
    half = max(count // 2, _LEAST)
    if half < count and (farther := ascending[-half:] - ascending[-half - 1]).mean() > 0:
        heavier, _ = _fit(farther)
        if heavier > shape:
            shape, scale = heavier, _scale(excess, heavier)
    return Tail(threshold, shape, scale, count, total)


def tail_p_values(reference: Values, x: Values, total: int, *, extrapolate: bool = True) -> Values:
    """P(X >= x) under the distribution that a reference was drawn from.

    ``(1 + #{reference >= x}) / (1 + total)``; with ``extrapolate``, beyond the threshold of the fit, the
    fitted tail, so that p can be smaller than 1 / (1 + total).

    Args:
        reference: values of the reference, in any order.
        x: values of any shape.
        total: draws that the reference values are the upper part of: their number, or more where those that
            are not listed count as smaller than any x of interest.
        extrapolate: take the fitted tail where there is one.

    Returns:
        In (0, 1], in the shape of ``x``.
    """
    ascending = np.sort(reference)
    larger = len(ascending) - np.searchsorted(ascending, x, side="left")
    p = np.asarray((1.0 + larger) / (1 + total))
    tail = fit_tail(ascending, total) if extrapolate else None
    if tail is not None:
        far = x > tail.threshold
        p[far] = tail.probability(x[far])
    return np.clip(p, _SMALLEST, 1)


def _fit(excess: Values) -> tuple[float, float]:
    """Shape and scale by maximum likelihood, by the profile in shape / scale (Grimshaw 1993)."""
    mean = float(excess.mean())

    def shape(ratio: float) -> float:
        return float(np.log1p(ratio * excess).mean())

    def loss(log_ratio: float) -> float:
        found = shape(ratio := np.exp(log_ratio))
        return float(np.log(found / ratio) + found)

    ratios = np.geomspace(1e-3, 30, 30) / mean
    shapes = np.log1p(ratios[:, None] * excess).mean(1)
    losses, grid = np.log(shapes / ratios) + shapes, np.log(ratios)
    best = int(np.argmin(losses))
    # at the left end the likelihood of the exponential, which is its limit, is no worse
    if best == 0 and losses[0] >= np.log(mean):
        return 0.0, mean
    around = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    ratio = float(np.exp(minimize_scalar(loss, bounds=around, method="bounded").x))
    if (found := shape(ratio)) <= _SHAPES[1]:
        return max(found, _SHAPES[0]), found / ratio
    return _SHAPES[1], _scale(excess, _SHAPES[1])


def _scale(excess: Values, shape: float) -> float:
    """Most likely scale for a given shape > 0."""
    centre = np.log(excess.mean())

    def loss(log_scale: float) -> float:
        scaled = shape * excess / np.exp(log_scale)
        return float(log_scale + (1 + 1 / shape) * np.log1p(scaled).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(centre - 6, centre + 2), method="bounded").x))
