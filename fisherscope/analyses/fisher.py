"""The Fisher information of every group, with its uncertainty."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from typing_extensions import override

from fisherscope.analyses import bootstrap
from fisherscope.analyses.config import FisherConfig
from fisherscope.analyses.context import Context
from fisherscope.analyses.groupvalues import group_chunks
from fisherscope.analyses.registry import register
from fisherscope.analyses.result import Result
from fisherscope.analyses.signal import group_signal
from fisherscope.analyses.units import Units, head_maps, slice_name
from fisherscope.linalg import Moments
from fisherscope.linalg.normalization import NORMALIZATIONS
from fisherscope.store import ContributionStore
from fisherscope.words import counted

Array = NDArray[np.float64]

# A sample that carries more of a task's F than this is named in a warning.
_LARGE_SHARE = 0.15


def ema_weights(n: int, decay: float, first: int = 0, count: int | None = None) -> Array:
    """Weights of samples in a bias-corrected exponential moving average.

    The average after n steps of ``m = decay * m + (1 - decay) * x``, divided by ``1 - decay^n``, is the
    weighted sum of the samples with ``(1 - decay) decay^(n - 1 - t) / (1 - decay^n)`` (Kingma & Ba 2015,
    section 3). It depends on the order of the samples.

    Args:
        n: number of all samples.
        decay: at least 0, below 1.
        first: the first sample wanted.
        count: how many are wanted; all after ``first`` when None.

    Returns:
        ``[count]``; all weights together sum to 1.
    """
    age = n - 1 - np.arange(first, n if count is None else first + count)
    return np.asarray((1 - decay) * decay**age / (1 - decay**n), np.float64)


def t_interval(mean: Array, variance: Array, n: int, confidence: float) -> tuple[Array, Array]:
    """Student's interval of the mean of n values that are not negative; NaN for fewer than two.

    Returns:
        Lower and upper ends, in the shape of ``mean``. F cannot be negative, so a low end below 0 is 0.
    """
    if n < 2:
        return np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * np.sqrt(variance / n)
    return np.maximum(mean - half, 0), mean + half


@dataclass
class GroupStatistics:
    """Running statistics of per-sample values, fed some samples at a time, in order.

    Attributes:
        n: number of samples in all.
        decay: of the moving average.
        moments: count, mean and squared deviations so far.
        largest: the largest value of each column.
        largest_row: the sample that has it, the first of equals.
        ema: the bias-corrected moving average.
    """

    n: int
    size: int
    decay: float
    moments: Moments = field(init=False)
    largest: Array = field(init=False)
    largest_row: NDArray[np.int64] = field(init=False)
    ema: Array = field(init=False)

    def __post_init__(self) -> None:
        self.moments = Moments.empty(self.size)
        self.largest = np.full(self.size, -np.inf)
        self.largest_row = np.zeros(self.size, np.int64)
        self.ema = np.zeros(self.size)

    def add(self, values: Array) -> None:
        """Take in the next samples ``[rows, size]``."""
        first = self.moments.count
        self.ema += ema_weights(self.n, self.decay, first, len(values)) @ values
        row = values.argmax(0)
        highest = values[row, np.arange(values.shape[1])]
        higher = highest > self.largest
        self.largest[higher], self.largest_row[higher] = highest[higher], first + row[higher]
        self.moments = self.moments.merge(Moments.of(values))

    @property
    def largest_share(self) -> Array:
        """Share of the sum that the largest sample has; NaN where the sum is 0."""
        total = self.moments.mean * self.moments.count
        return np.divide(self.largest, total, out=np.full_like(total, np.nan), where=total > 0)


@dataclass(kw_only=True, eq=False, repr=False)
class FisherResult(Result):
    """F per task and group.

    ``frame`` columns: task, n, the columns of :class:`Units`; ``sum`` and ``mean`` of F over the entries
    of the group; ``variance`` and ``standard_error`` of the per-sample group mean; ``ci_low``,
    ``ci_high`` (t; the low end is not below 0, as F is not) and ``bootstrap_low``, ``bootstrap_high``;
    ``largest_share``, ``largest_sample``;
    ``ema``; ``fisher_none``, ``fisher_per_token``, ``fisher_mean`` (F under each normalization);
    ``signal``, ``noise``. ``data`` holds the weight head slices with axes (task, layer, block, head).
    """

    @override
    def top(self, k: int = 10, *, kind: str = "head", task: str | None = None) -> pd.DataFrame:
        """The groups of one kind with the highest mean F; of heads and channels the weights only."""
        rows = self.frame[self.frame["kind"] == kind]
        if kind in {"head", "channel"}:
            rows = rows[rows["part"] == "weight"]
        if task is not None:
            rows = rows[rows["task"] == task]
        return rows.sort_values("mean", ascending=False, kind="stable").head(k).reset_index(drop=True)

    @override
    def summary(self) -> str:
        return "\n".join(_sentence(task, rows) for task, rows in self.frame.groupby("task", sort=False))


def _sentence(task: Any, rows: pd.DataFrame) -> str:
    model = rows[rows["kind"] == "model"].iloc[0]
    heads = rows[(rows["kind"] == "head") & (rows["part"] == "weight")]
    text = f"{task}: F is {model['mean']:.3g} per parameter on average over {counted(model['n'], 'sample')}"
    if model["n"] > 1:
        text += f" ({model['ci_low']:.3g} to {model['ci_high']:.3g})"
    text += f"; {model['largest_sample']} alone carries {model['largest_share']:.1%} of it."
    if len(heads) and heads["sum"].sum() > 0:
        best = heads.sort_values("sum", ascending=False, kind="stable").iloc[0]
        share = best["sum"] / heads["sum"].sum()
        text += f" Of the attention slices {slice_name(best, head='index')} holds most ({share:.1%})."
    return text


@register("fisher", requires=("groups",), config=FisherConfig)
def fisher(store: ContributionStore, config: FisherConfig, context: Context) -> FisherResult:
    """F of every group with variance, intervals, and what single samples carry.

    Returns:
        A :class:`FisherResult` over all chosen tasks.
    """
    units = Units.of_layout(store.layout, store.parameters)
    frames = [_task_frame(store, task, units, config, context) for task in context.tasks]
    frame = pd.concat(frames, ignore_index=True)
    heads = frame[(frame["kind"] == "head") & (frame["part"] == "weight")].rename(columns={"index": "head"})
    columns = ["mean", "variance", "standard_error", "largest_share", "signal", "noise"]
    notes = []
    for task, rows in frame[frame["kind"] == "model"].groupby("task", sort=False):
        share, sample = rows["largest_share"].iloc[0], rows["largest_sample"].iloc[0]
        # among few samples each carries much: 3 / n is three times its even share
        if rows["n"].iloc[0] > 1 and share > max(_LARGE_SHARE, 3 / rows["n"].iloc[0]):
            notes.append(
                f"{sample} carries {share:.0%} of the Fisher information of {task!r}: numbers of this task "
                "rest to a good part on this one sample"
            )
    return FisherResult(
        name="fisher",
        config=_plain(config, store),
        frame=frame,
        data=head_maps(heads, columns, {"task": context.tasks}) if len(heads) else None,
        warnings=notes,
    )


def _plain(config: FisherConfig, store: ContributionStore) -> dict[str, Any]:
    return {**asdict(config), "normalization": store.header.normalization}


def _task_frame(
    store: ContributionStore, task: str, units: Units, config: FisherConfig, context: Context
) -> pd.DataFrame:
    ids = store.samples(task)["id"].to_numpy()
    n, normalization = len(ids), store.header.normalization
    statistics = GroupStatistics(n, len(units), config.ema_decay)
    drawn = units.of_kind(*config.bootstrap_kinds)
    kept: list[Array] = []
    sums = {name: np.zeros(units.groups) for name in NORMALIZATIONS}
    for chunk in group_chunks(store, task, context.memory_budget):
        values = units.expand(chunk.contributions(normalization)) / units.sizes
        statistics.add(values)
        kept.append(values[:, drawn])
        for name in NORMALIZATIONS:
            sums[name] += chunk.contributions(name).sum(0)

    frame = pd.concat([pd.DataFrame({"task": task, "n": n}, index=units.frame.index), units.frame], axis=1)
    moments = statistics.moments
    frame["sum"], frame["mean"] = moments.mean * units.sizes, moments.mean
    frame["variance"] = moments.variance
    frame["standard_error"] = np.sqrt(moments.variance / n)
    frame["ci_low"], frame["ci_high"] = t_interval(moments.mean, moments.variance, n, config.confidence)
    frame["bootstrap_low"] = frame["bootstrap_high"] = np.nan
    if config.bootstrap and n > 1:
        resamples = bootstrap.weights(n, config.bootstrap, context.rng("fisher", task))
        low, high = bootstrap.percentile_interval(
            np.concatenate(kept), resamples, config.confidence, context.memory_budget
        )
        frame.loc[drawn, "bootstrap_low"], frame.loc[drawn, "bootstrap_high"] = low, high
    frame["largest_share"] = statistics.largest_share
    frame["largest_sample"] = ids[statistics.largest_row]
    frame["ema"] = statistics.ema
    for name, total in sums.items():
        frame[f"fisher_{name}"] = units.expand(total) / n / units.sizes
    signal = group_signal(store, task)
    frame["signal"] = np.nan if signal is None else units.expand(signal) / units.sizes
    # S and F come from two float32 aggregates: their difference may fall below zero by rounding alone
    frame["noise"] = (frame["mean"] - frame["signal"]).clip(lower=0)
    return frame
