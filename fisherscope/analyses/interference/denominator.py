"""The F that scores are divided by: whose it is, how it is damped, and what it looks like."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from fisherscope.analyses.config import InterferenceConfig
from fisherscope.analyses.slices import Block, SliceReader, damping

Pair = tuple[str, str]


@dataclass(frozen=True)
class Ridge:
    """Damping as applied to diagonal F, relative to the median of a block."""

    epsilon: float
    ridge: float
    ridge_rel: float

    @classmethod
    def of(cls, config: InterferenceConfig) -> Ridge:
        """The damping of a config; the test of overlap uses that of the diagonal forms with every form."""
        return cls(config.epsilon, config.ridge, 1e-6 if config.form == "full" else config.relative_ridge)


@dataclass(frozen=True)
class Health:
    """What F of a slice looks like: the denominator of the scores.

    Attributes:
        fisher_min, fisher_median, fisher_max: of F over the slice (its diagonal, for the form "full").
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
    def of(cls, fisher: Tensor, lam: float, epsilon: float, exponent: int = 0) -> Health:
        """Measure F ``[k]`` of one slice; F and lam are in units of ``4 ** -exponent``."""
        low, high = fisher.aminmax()
        below = float((fisher < epsilon).double().mean())
        unit = 4.0**-exponent
        median = float(fisher.median()) * unit
        return cls(float(low) * unit, median, float(high) * unit, below, lam * unit, not float(high) > 0)

    @classmethod
    def unknown(cls) -> Health:
        """Of a pair of tasks that has no scores."""
        nan = float("nan")
        return cls(nan, nan, nan, nan, nan, flat=False)


def sources(pool: str, a: str, b: str) -> tuple[str, ...]:
    """The tasks whose F enters the denominator of a pair."""
    return {"A": (a,), "B": (b,), "pooled": (a, b)}[pool] if a != b else (a,)


def denominators(
    reader: SliceReader, block: Block, pairs: list[Pair], config: InterferenceConfig
) -> dict[Pair, tuple[Tensor, float]]:
    """F ``[heads, size]`` and lam of the block for each pair of tasks."""
    by_pair = {(a, b): sources(config.pool, a, b) for a, b in pairs}
    by_task = {task: reader.fisher(task, block) for task in dict.fromkeys(chain(*by_pair.values()))}
    made: dict[tuple[str, ...], tuple[Tensor, float]] = {}
    for source in by_pair.values():
        if source not in made:
            fisher = torch.stack([by_task[task] for task in source]).mean(0)
            made[source] = fisher, damping(fisher, Ridge.of(config), reader.exponent)
    return {pair: made[source] for pair, source in by_pair.items()}
