"""The full form: the inverse of the whole Fisher matrix of a slice, in the Gram matrix of its samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherscope.analyses.config import InterferenceConfig
from fisherscope.analyses.interference.denominator import sources
from fisherscope.analyses.interference.pairs import Stretch
from fisherscope.analyses.slices import Loaded, SliceReader
from fisherscope.linalg.normalization import factors
from fisherscope.linalg.woodbury import DampedFisher, without_pair

Matrix = NDArray[np.float64]

_COLUMNS = 1024


@dataclass(frozen=True)
class Solved:
    """M of one ordered pair of tasks on one slice.

    Attributes:
        scores: with F over all samples, ``[n_a, n_b]``.
        left_out: with F over all samples but the two of each pair, ``[n_a, n_b]``.
        lam: damping.
        smallest: smallest non-zero eigenvalue of F.
    """

    scores: Matrix
    left_out: Matrix
    lam: float
    smallest: float

    @property
    def barely_damped(self) -> bool:
        """Whether lam is below the smallest non-zero eigenvalue: M then tells little of the samples."""
        return self.lam < self.smallest


class FullScorer:
    """Scores of ordered pairs of tasks on one slice, ``h_i' (sum_k w_k h_k h_k' + lam I)^-1 h_j``.

    w is 1 / n over the samples of the task whose F divides, half of that for each of two that are pooled.
    Holds Gram matrices of all samples of two tasks in float64, and as many again while it works on them.

    Attributes:
        rows: samples that form pairs, per task.
        all_rows: samples that F is made of, per task.
    """

    def __init__(self, reader: SliceReader, tasks: tuple[str, ...], config: InterferenceConfig) -> None:
        self.reader, self.config = reader, config
        self.all_rows = {task: reader.stored(task) for task in tasks}
        limit = config.max_samples_per_task
        self.rows = {task: n if limit is None else min(n, limit) for task, n in self.all_rows.items()}
        self._factors = {task: self._factors_of(task) for task in tasks}
        self._slice: Loaded | None = None
        self._grams: dict[tuple[str, str], Matrix] = {}
        self._solved: dict[tuple[str, str], Solved] = {}

    def stretches(self, loaded: Loaded, a: str, b: str, fisher: Tensor, lam: float) -> Iterator[Stretch]:
        """M as a single stretch; F and lam come from the gradients themselves."""
        del fisher, lam
        solved = self.solve(loaded, a, b)
        rows, columns = slice(0, self.rows[a]), slice(0, self.rows[b])
        scores, reported = (
            torch.from_numpy(values[rows, columns].astype(np.float32))
            for values in (solved.scores, solved.left_out)
        )
        stretch = Stretch(rows, columns, scores, reported=reported)
        if a == b:
            stretch.blank_diagonal()
        yield stretch

    def solve(self, loaded: Loaded, a: str, b: str) -> Solved:
        """M over all samples of both tasks, once per slice and pair."""
        if self._slice is not loaded:
            self._slice, self._grams, self._solved = loaded, {}, {}
        if (a, b) not in self._solved:
            if self.config.pool == "pooled" and (b, a) in self._solved:
                twin = self._solved[b, a]
                return Solved(twin.scores.T, twin.left_out.T, twin.lam, twin.smallest)
            self._solved[a, b] = self._solve(loaded, a, b)
        return self._solved[a, b]

    def _solve(self, loaded: Loaded, a: str, b: str) -> Solved:
        tasks = sources(self.config.pool, a, b)
        counts = [self.all_rows[task] for task in tasks]
        gram = np.block([[self._gram(loaded, s, t) for t in tasks] for s in tasks])
        share, size = 1 / len(tasks), loaded.block.partition.slice_size
        fisher = DampedFisher.of(gram, np.repeat([share / n for n in counts], counts), size)
        # gradients are in the units of the reader, and so are eigenvalues and lam
        ridge = self.config.ridge * 4.0**self.reader.exponent
        lam = max(self.config.epsilon, ridge, self.config.relative_ridge * fisher.mean_eigenvalue)
        # weights without the samples of a pair; a task's only sample is taken out of its own weight
        gone = 2 if a == b else 1
        left = [share / max(n - gone, 1) for n in counts]
        if len(set(counts)) == 1:
            less = fisher.times(counts[0] / max(counts[0] - gone, 1))
        else:
            less = DampedFisher.of(gram, np.repeat(left, counts), size)
        ends = np.cumsum(counts).tolist()
        spans = {t: slice(end - n, end) for t, n, end in zip(tasks, counts, ends, strict=True)}
        weights = dict(zip(tasks, left, strict=True))
        own = less.within(lam).diagonal()
        if a in spans and b in spans:
            place = spans[a], spans[b]
            scores, pair = fisher.within(lam)[place], less.within(lam)[place]
            left_out = without_pair(pair, own[spans[a]], own[spans[b]], weights[a], weights[b])
            return Solved(scores, left_out, lam, fisher.smallest_eigenvalue)
        # F is that of one task: the other task's samples are not in it
        inside, other = (a, b) if a in spans else (b, a)
        cross = self._gram(loaded, inside, other)
        scores, pair = fisher.across(cross, lam), less.across(cross, lam)
        left_out = without_pair(pair, own, np.zeros(pair.shape[1]), weights[inside], 0.0)
        if inside == b:
            scores, left_out = scores.T, left_out.T
        return Solved(scores, left_out, lam, fisher.smallest_eigenvalue)

    def _gram(self, loaded: Loaded, a: str, b: str) -> Matrix:
        """Inner products of h of all samples of two tasks ``[n_a, n_b]``, in float64."""
        if (b, a) in self._grams:
            return self._grams[b, a].T
        if (a, b) not in self._grams:
            found = torch.empty(self.all_rows[a], self.all_rows[b], dtype=torch.float64, device="cpu")
            for rows, first in loaded(a):
                for columns, second in loaded(b):
                    found[rows, columns] = _inner(first, second)
            self._grams[a, b] = found.numpy() * self._factors[a][:, None] * self._factors[b]
        return self._grams[a, b]

    def _factors_of(self, task: str) -> Matrix:
        """What makes h_i of g_i, in float64 ``[n]``."""
        tokens = self.reader.store.samples(task)["tokens"].to_numpy()
        return factors(tokens, self.reader.store.header.normalization)[: self.all_rows[task]]


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """Inner products in float64, some columns at a time."""
    out = torch.zeros(len(first), len(second), dtype=torch.float64, device="cpu")
    for start in range(0, first.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        out.addmm_(first[:, columns].double(), second[:, columns].double().T)
    return out
