"""All pairs of samples of two tasks on one head slice, within a budget of memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from fisherscope.analyses.config import InterferenceConfig
from fisherscope.analyses.interference.form import gradient_scale, interference_matrix
from fisherscope.analyses.slices import Block, Loaded, SliceReader, damping
from fisherscope.analyses.top import TopPairs


@dataclass(frozen=True)
class Health:
    """What F of a slice looks like: the denominator of the scores.

    Attributes:
        fisher_min, fisher_median, fisher_max: of F over the slice.
        below_epsilon: share of its entries where F is below ``epsilon``.
        ridge: lam as applied.
        flat: F is 0 throughout, and the scores are 0 for that reason.
    """

    fisher_min: float
    fisher_median: float
    fisher_max: float
    below_epsilon: float
    ridge: float
    flat: bool

    @classmethod
    def of(cls, fisher: Tensor, lam: float, epsilon: float) -> Health:
        """Measure F ``[k]`` of one slice."""
        low, high = fisher.aminmax()
        below = float((fisher < epsilon).double().mean())
        return cls(float(low), float(fisher.median()), float(high), below, lam, not float(high) > 0)


class PairScorer:
    """Scores of ordered pairs of tasks, block by block.

    Attributes:
        rows: samples that form pairs, per task.
    """

    def __init__(self, reader: SliceReader, tasks: tuple[str, ...], config: InterferenceConfig) -> None:
        self.reader, self.config = reader, config
        self.rows = {task: reader.rows(task, config.max_samples_per_task) for task in tasks}
        self._scale = {task: gradient_scale(reader.store, task, config.normalize_gj) for task in tasks}

    def denominators(
        self, block: Block, pairs: list[tuple[str, str]]
    ) -> dict[tuple[str, str], tuple[Tensor, float]]:
        """F ``[heads, size]`` and lam of the block for each pair."""
        pool = self.config.fisher_pool
        # the tasks whose F enters a pair's denominator
        sources = {(a, b): {"A": (a,), "B": (b,), "pooled": (a, b)}[pool] for a, b in pairs}
        by_task = {task: self.reader.fisher(task, block) for task in dict.fromkeys(chain(*sources.values()))}
        made: dict[tuple[str, ...], tuple[Tensor, float]] = {}
        for source in sources.values():
            if source not in made:
                fisher = torch.stack([by_task[task] for task in source]).mean(0)
                made[source] = fisher, damping(fisher, self.config)
        return {pair: made[source] for pair, source in sources.items()}

    def scores(
        self, loaded: Loaded, a: str, b: str, fisher: Tensor, lam: float
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Stretches of M: rows of the first task, columns of the second, scores.

        Where a task meets itself, a sample's score with itself is NaN.
        """
        for rows, left in loaded(a):
            contributions = (left * self.reader.factors(a)[rows, None]).square_()
            for columns, right in loaded(b):
                scale = self._scale[b]
                scaled = right if scale is None else right * scale[columns, None]
                found = interference_matrix(contributions, fisher, scaled, lam, self.config.aggregate)
                if a == b:
                    own = torch.arange(rows.start, rows.stop)[:, None] == torch.arange(
                        columns.start, columns.stop
                    )
                    found.masked_fill_(own, torch.nan)
                yield rows, columns, found

    def measure(
        self, loaded: Loaded, a: str, b: str, fisher: Tensor, lam: float, top: TopPairs, label: int
    ) -> dict[str, float]:
        """``mean`` and ``max`` of M over the pairs, and ``sample_q95``; the best pairs go to ``top``.

        ``sample_q95`` is the 95 % quantile, over the first task's samples, of a sample's mean score: how much
        its most demanding samples lean on the slice. (The mean over all samples cannot tell: where F is the
        first task's own, their contributions relative to F average to 1.)
        """
        n = self.rows[a]
        totals, counts = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        highest = float("-inf")
        for rows, columns, scores in self.scores(loaded, a, b, fisher, lam):
            top.offer(scores.numpy(), label, first_row=rows.start, first_column=columns.start)
            valid = ~scores.isnan()
            totals[rows] += scores.nansum(1, dtype=torch.float64)
            counts[rows] += valid.sum(1)
            if bool(valid.any()):
                highest = max(highest, float(scores[valid].max()))
        if not float(counts.sum()):
            return dict.fromkeys(("mean", "max", "sample_q95"), float("nan"))
        samples = (totals / counts)[counts > 0]
        return {
            "mean": float(totals.sum() / counts.sum()),
            "max": highest,
            "sample_q95": float(samples.quantile(0.95)),
        }
