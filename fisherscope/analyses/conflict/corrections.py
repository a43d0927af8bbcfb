"""Corrections of p-values for having asked many questions at once."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisherscope.errors import UsageError

Values = NDArray[np.float64]
Correction = Literal["bh", "by", "ebh"]


def adjust(p: ArrayLike, method: Correction = "bh") -> Values:
    """q-values: calling everything with q <= level keeps the expected share of false calls at level.

    Args:
        p: p-values of any shape, all corrected together.
        method: "bh", Benjamini and Hochberg (1995), for p that are independent or positively dependent.
            "by", Benjamini and Yekutieli (2001), under any dependence, at a price of log(number) + 0.58.
            "ebh", Wang and Ramdas (2022), under any dependence, on the e-values of :func:`e_values`.

    Returns:
        q in the shape of ``p``, float64, at most 1. The smallest level at which each would be called.

    Raises:
        ValueError: p outside [0, 1] or NaN, or an unknown method.
    """
    values = _checked(p)
    if method not in get_args(Correction):
        raise UsageError(f"method is {method!r}; it must be one of {', '.join(get_args(Correction))}")
    if not values.size:
        return values
    if method == "ebh":
        return e_bh(e_values(values))
    from statsmodels.stats.multitest import fdrcorrection

    _, q = fdrcorrection(values.ravel(), method="indep" if method == "bh" else "negcorr")
    return np.asarray(q, np.float64).reshape(values.shape)


def e_values(p: ArrayLike) -> Values:
    """Evidence against each null, of expected value at most 1 under it: (1 - p + p ln p) / (p (ln p)^2).

    The mixture over k in (0, 1) of the calibrators k p^(k - 1): Vovk and Wang (2021), equation 1.

    Returns:
        In the shape of ``p``; 1/2 at p = 1, infinite at p = 0.
    """
    values = _checked(p)
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.log(values)
        found = (1 - values + values * log) / (values * log**2)
    # the formula is 0 / 0 at 1 and loses its digits nearby: the series of p = 1 - x
    found = np.where(values > 1 - 1e-4, 0.5 + (1 - values) / 6, found)
    return np.asarray(np.where(values == 0, np.inf, found))


def e_bh(e: ArrayLike) -> Values:
    """q-values of e-values: the e-BH procedure, valid under any dependence (Wang and Ramdas 2022).

    With e_(1) >= e_(2) >= ..., q_(k) is the smallest m / (l e_(l)) over l >= k.

    Returns:
        q in the shape of ``e``, at most 1.

    Raises:
        ValueError: negative or NaN.
    """
    values = np.asarray(e, np.float64)
    if not (values >= 0).all():
        raise UsageError("e-values must be numbers >= 0")
    flat = values.ravel()
    order = np.argsort(-flat, kind="stable")
    with np.errstate(divide="ignore"):
        level = flat.size / (np.arange(1, flat.size + 1) * flat[order])
    q = np.empty_like(flat)
    q[order] = np.minimum.accumulate(level[::-1])[::-1].clip(max=1)
    return q.reshape(values.shape)


def adjust_directional(p: ArrayLike, method: Correction = "bh") -> tuple[Values, NDArray[np.int64]]:
    """q-values that allow to call either direction, from one-sided p-values of "below".

    Two-sided p = 2 min(p, 1 - p); the direction is read from which side is smaller. Among the calls, the
    expected share of wrong directions is at most level / 2 beside false calls (Benjamini and Yekutieli 2005).
    For p with a continuous distribution: :func:`~fisherscope.analyses.conflict.sample_test.sample_test` and
    :func:`~fisherscope.analyses.conflict.block_test.block_test`. Not for the pair test, whose null is
    one-sided.

    Returns:
        q in the shape of ``p``, and -1 (below, conflict) or 1 (above, synergy).
    """
    values = _checked(p)
    q = adjust(np.minimum(2 * np.minimum(values, 1 - values), 1), method)
    return q, np.where(values < 0.5, -1, 1)


def _checked(p: ArrayLike) -> Values:
    values = np.asarray(p, np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        bad = np.count_nonzero(~((values >= 0) & (values <= 1)))
        raise UsageError(f"{bad} of {values.size} p-values are NaN or outside [0, 1]")
    return values
