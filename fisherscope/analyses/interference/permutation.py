"""Whether two tasks lean on and move the same entries more, or less, than the samples of either alone do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from fisherscope.analyses.interference.form import FORMS, product, whitening
from fisherscope.analyses.interference.pairs import row_stretches
from fisherscope.analyses.slices import Loaded

Values = NDArray[np.float64]

NAMES = ["effect", "p", "p_max", "q"]


@dataclass
class _Direction:
    """Of one ordered pair of tasks: per slice effect, z and p, and the largest z of each draw."""

    largest: Values
    effect: list[float] = field(default_factory=list)
    z: list[float] = field(default_factory=list)
    p: list[float] = field(default_factory=list)


class OverlapTest:
    """Label permutations of the overlap of two tasks, the same ones for all slices.

    The overlap of samples i and j on a slice of k entries is ``k sum_k q_ik r_jk`` with q = C_i / (F + lam)
    and r = |g_j|, each divided by its sum: 1 if either is spread evenly, whatever their magnitudes. Effect:
    mean overlap of a sample of A and one of B, less the mean of the two means within a task, a sample with
    itself left out. Null hypothesis: on this slice, samples of both tasks are exchangeable. F is the mean
    over all samples of both tasks, which permuted labels leave as it is.

    p is two-sided, with the statistic standardised by its permutations; ``p_max`` holds for all slices at
    once (max-T, Westfall and Young 1993), ``q`` are those of Benjamini and Hochberg over the slices. An
    effect below 0 means tasks that are apart on the slice, above 0 more load across tasks than within either.
    Direction is
    not seen: opposed and agreeing gradients overlap alike.

    Attributes:
        labels: 1 for samples of the first task, else 0; observed labels first, ``[permutations + 1, n]``.
    """

    def __init__(self, n_a: int, n_b: int, permutations: int, rng: np.random.Generator) -> None:
        self.labels = torch.zeros(permutations + 1, n_a + n_b, dtype=torch.float64, device="cpu")
        self.labels[0, :n_a] = 1
        observed = self.labels[0].numpy()
        for draw in range(1, permutations + 1):
            self.labels[draw] = torch.from_numpy(rng.permutation(observed))
        self._directions = tuple(_Direction(np.zeros(permutations + 1)) for _ in range(2))

    def slice(self, loaded: Loaded, a: str, b: str, fisher: Tensor, lam: float) -> None:
        """Test one slice.

        Args:
            loaded: its gradients.
            a, b: the tasks.
            fisher: F over all samples of both ``[k]``.
            lam: damping.
        """
        white = whitening(fisher, lam)
        within = torch.zeros_like(self.labels)
        columns_sums = torch.zeros(self.labels.shape[1], dtype=torch.float64, device="cpu")
        present = torch.zeros(self.labels.shape[1], dtype=torch.bool, device="cpu")
        for rows, columns, overlap in _overlaps(loaded, a, b, white):
            # of a sample without a gradient there it is 0 / 0
            present[rows] |= ~overlap.isnan().all(1)
            own = torch.arange(rows.start, rows.stop, dtype=torch.int64, device="cpu")[
                :, None
            ] == torch.arange(columns.start, columns.stop, dtype=torch.int64, device="cpu")
            values = overlap.nan_to_num_(0.0).masked_fill_(own, 0.0).double()
            within[:, columns].addmm_(self.labels[:, rows], values)
            columns_sums[columns] += values.sum(0)
        statistics = _statistics(self.labels, within, columns_sums, present.double())
        for direction, statistic in zip(self._directions, statistics, strict=True):
            _note(direction, statistic)

    def results(self) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        """``effect``, ``p``, ``p_max`` and ``q`` of each slice in order, for A on B and for B on A."""
        first, second = (_corrected(direction) for direction in self._directions)
        return first, second


def _overlaps(loaded: Loaded, a: str, b: str, white: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Overlaps of the samples of both tasks, those of the first before those of the second."""
    start = {a: 0, b: loaded.chunks[a][-1].stop}

    def pieces() -> Iterator[tuple[slice, Tensor]]:
        found = (
            (slice(start[task] + rows.start, start[task] + rows.stop), values)
            for task in (a, b)
            for rows, values in loaded(task)
        )
        if not loaded.fits:
            yield from found
            return
        together = [values for _, values in found]
        yield slice(0, sum(map(len, together))), torch.cat(together)

    for rows, left in pieces():
        for columns, right in pieces():
            for some in row_stretches(len(left), len(right), loaded.reader.memory_budget):
                found = product(FORMS["unsigned"], left[some], right, white)
                scale = torch.outer(found.left, found.right).div_(len(white))
                place = slice(rows.start + some.start, rows.start + some.stop)
                yield place, columns, found.scores.div_(scale)


def _statistics(labels: Tensor, within: Tensor, columns: Tensor, present: Tensor) -> tuple[Values, Values]:
    """Effects of A on B and of B on A for each set of labels, ``[permutations + 1]``; NaN where undefined.

    With labels y and overlaps O, all sums come from ``y'O``: within A y'Oy, A on B y'O(1 - y), B on A
    (1 - y)'Oy, within B the rest.
    """
    from_first = within.sum(1)
    to_first = (labels * columns).sum(1)
    inside = (within * labels).sum(1)
    total = columns.sum()
    n_a = (labels * present).sum(1)
    n_b = present.sum() - n_a
    outside = total - from_first - to_first + inside
    mean_within = (inside / (n_a * (n_a - 1)) + outside / (n_b * (n_b - 1))) / 2
    across = n_a * n_b
    undefined = (n_a < 2) | (n_b < 2)
    first, second = (
        ((sums - inside) / across - mean_within).masked_fill(undefined, torch.nan).numpy()
        for sums in (from_first, to_first)
    )
    return first, second


def _note(direction: _Direction, statistic: Values) -> None:
    """Standardise by the permutations, observed labels included, so that p is exact."""
    effect = float(statistic[0])
    direction.effect.append(effect)
    if np.isnan(effect):
        direction.z.append(float("nan"))
        direction.p.append(float("nan"))
        return
    mean, spread = np.nanmean(statistic), np.nanstd(statistic)
    size = np.abs(np.nan_to_num(statistic - mean))
    # equal statistics differ by rounding only
    z = (
        size / spread
        if spread > 1e-9 * max(1.0, float(np.nanmax(np.abs(statistic))))
        else np.zeros_like(size)
    )
    direction.z.append(float(z[0]))
    direction.p.append(_share(z, float(z[0])))
    np.maximum(direction.largest, z, out=direction.largest)


def _share(draws: Values, observed: float) -> float:
    """Share of the draws that are at least as large, the observed one among them."""
    return float(np.mean(draws >= observed * (1 - 1e-9)))


def _corrected(direction: _Direction) -> list[dict[str, float]]:
    p = np.array(direction.p)
    q = np.full_like(p, np.nan)
    if (known := ~np.isnan(p)).any():
        q[known] = stats.false_discovery_control(p[known], method="bh")
    nan = float("nan")
    p_max = [nan if np.isnan(z) else _share(direction.largest, z) for z in direction.z]
    return [
        dict(zip(NAMES, values, strict=True))
        for values in zip(direction.effect, direction.p, p_max, q.tolist(), strict=True)
    ]
