"""Which pairs of samples of two tasks oppose each other more than noise does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisherscope.analyses.conflict.corroboration import corroboration
from fisherscope.analyses.conflict.inputs import unit_grams
from fisherscope.analyses.conflict.tail import exceedances, tail_p_values
from fisherscope.analyses.conflict.within import Within

Matrix = NDArray[np.float64]

LEAST_SAMPLES = 4
# Capital from which on a fitted tail is trusted beyond the data: 1 / .05.
CORROBORATED = 20.0


@dataclass(frozen=True)
class PairStatistics:
    """What the pair test compares.

    Attributes:
        z: cosines across tasks on the scales that their samples have within their own tasks, ``[n_a, n_b]``.
        mirrored: the same on scales that are not smaller than those of the positive cosines of the sample
            across tasks, ``[n_a, n_b]``.
        reference: scaled, centred cosines of the pairs within tasks, ``[n_a (n_a-1)/2 + n_b (n_b-1)/2]``.
        corroboration: evidence that the most opposed pairs lie across tasks, counting pairs that share no
            sample (see :func:`~fisherscope.analyses.conflict.corroboration.corroboration`).
    """

    z: Matrix
    mirrored: Matrix
    reference: Matrix
    corroboration: float

    @property
    def corroborated(self) -> bool:
        """Whether p-values may be smaller than ranks among the reference give."""
        return self.corroboration >= CORROBORATED

    def p_values(self, *, extrapolate: bool | None = None) -> Matrix:
        """The larger p-value of both nulls, ``[n_a, n_b]``.

        Args:
            extrapolate: whether p may come from fitted tails; by default, where the pairs are
                ``corroborated``. True, without looking, is not calibrated where tails are heavy.
        """
        reach = self.corroborated if extrapolate is None else extrapolate
        within = tail_p_values(-self.reference, -self.z, len(self.reference), extrapolate=reach)
        positive = self.mirrored[self.mirrored > 0]
        mirror = tail_p_values(positive, -self.mirrored, self.mirrored.size, extrapolate=True)
        return np.maximum(within, mirror)


def pair_statistics(cross: ArrayLike, within_a: ArrayLike, within_b: ArrayLike) -> PairStatistics:
    """The statistics of :func:`pair_test`, for who wants to look at them."""
    across, left, right = unit_grams(cross, within_a, within_b, least=LEAST_SAMPLES)
    a, b = Within.of(left, "within_a"), Within.of(right, "within_b")
    # E (u.v)^2 = tr(C_a C_b) <= |C_a| |C_b|: on this scale z across spreads no wider than z within
    unit = np.sqrt(a.pooled * b.pooled)
    z = across * (unit / (a.scale[:, None] * b.scale))
    above = np.maximum(across, 0) ** 2
    count = across > 0
    rows = np.maximum(a.scale, np.sqrt(above.sum(1) / np.maximum(count.sum(1), 1)))
    columns = np.maximum(b.scale, np.sqrt(above.sum(0) / np.maximum(count.sum(0), 1)))
    mirrored = across * (unit / (rows[:, None] * columns))
    return PairStatistics(z, mirrored, np.concatenate([a.scaled, b.scaled]), _corroboration(z, a, b))


def pair_test(cross: ArrayLike, within_a: ArrayLike, within_b: ArrayLike) -> Matrix:
    """One-sided p-values: is this pair of samples of two tasks in conflict?

    Null hypothesis of a pair, in words: its samples are no more opposed than two samples of the same task are
    by noise, *or* no more opposed than other pairs across the tasks are aligned. Only where both are
    implausible is p small: it is the larger of two.

    1. Reference: the cosines within each task, double-centred (H W H, renormalised), on scales s_i of their
       own: the root mean square of a sample's negative cosines, the pair itself left out,
       r_ij s / (s_i s_j), with s that of the task.
    2. Across: z_ij = c_ij sqrt(s_a s_b) / (s_i s_j); p is the share of reference values below z_ij.
    3. Mirror: with scales max(s_i, root mean square of the positive cosines of row i), p is the share of the
       pairs across that are as far on the positive side.
    4. Far out, p comes from a generalised Pareto tail of the 2 % most extreme reference values; its shape,
       between 0 and 1/2, is the larger one of two fits: to all of them, and to the farther half. One lone
       pair that is far beyond all others may be chance if tails are heavy, and no fit to the others can tell.
       So p goes beyond what ranks give, 1 / (1 + number of reference pairs), only if the most opposed pairs
       *that share no sample* are across tasks more often than a coin would have it: an e-value of 20, such as
       the first five of five (:func:`~fisherscope.analyses.conflict.corroboration.corroboration`).

    Samples that are exchangeable between the tasks (one task, split at random) have cosines of the same law
    within and across, so that p are conformal p-values (Bates et al. 2023, Annals of Statistics 51), and
    p-values beyond the ranks occur in about one of 20 splits at most, whatever the distribution. For tasks
    with different covariance this is no theorem: docs/statistics.md has what simulations show.

    The result depends on directions only: Gram matrices may be of unit vectors or not.

    Args:
        cross: ``[n_a, n_b]`` inner products of the natural gradients of tasks A and B.
        within_a: ``[n_a, n_a]`` those within A.
        within_b: ``[n_b, n_b]`` those within B.

    Returns:
        p ``[n_a, n_b]`` float64, in (0, 1]: to be corrected for the number of pairs
        (:func:`~fisherscope.analyses.conflict.corrections.adjust`). With fewer than 5 samples of a task, or
        fewer than about 15 of both, p never goes beyond the ranks: it is at least 1 / (1 + reference pairs),
        valid for each pair, but too coarse to survive a correction unless many pairs are in conflict, or one
        task has so many samples that there are far more reference pairs than pairs across.

    Raises:
        ValueError: NaN, shapes that do not fit, fewer than 4 samples of a task, a sample without a gradient,
            or samples that are all copies.
    """
    return pair_statistics(cross, within_a, within_b).p_values()


def _corroboration(z: Matrix, a: Within, b: Within) -> float:
    """Evidence from the most extreme pairs within and across."""
    n_a, n_b = z.shape
    reference = np.concatenate([a.scaled, b.scaled])
    if not (count := exceedances(len(reference), len(reference))):
        return 1.0
    threshold = np.partition(reference, count)[count]
    low = np.flatnonzero(reference < threshold)
    i, j = np.nonzero(z < threshold)
    first = np.concatenate([a.first, b.first + n_a])[low]
    second = np.concatenate([a.second, b.second + n_a])[low]
    return corroboration(
        np.concatenate([reference[low], z[i, j]]),
        np.concatenate([first, i]),
        np.concatenate([second, j + n_a]),
        n_a,
        n_b,
    )
