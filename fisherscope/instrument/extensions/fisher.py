"""The diagonal Fisher: square, then average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor
from typing_extensions import override

from fisherscope.errors import UsageError
from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions.base import Collector, Context, Extension
from fisherscope.instrument.extensions.full_sums import FullSums
from fisherscope.instrument.extensions.labelled_fisher import LabelledFisherCollector
from fisherscope.instrument.extensions.registry import register_extension
from fisherscope.instrument.squares import Sinks
from fisherscope.linalg.normalization import NORMALIZATIONS, Normalization
from fisherscope.plain import is_one_of, plain_fields
from fisherscope.store import SegmentWriter

FisherLabels = Literal["data", "sampled", "exact"]


@register_extension
@dataclass(frozen=True)
class Fisher(Extension):
    """F = E_i[h_i ** 2] per entry of every instrumented parameter, with the mean of h beside it.

    Attributes:
        shape: "full" keeps F and mean h in the parameter's shape (compensated sums in float32, 12 bytes per
            entry and task); "groups" keeps head, channel and parameter values only.
        labels: one label source or several. "data" is the empirical Fisher, from the one backward pass;
            "sampled" draws labels from what the model predicts, a backward pass for each draw (Kunstner et
            al. 2019 on why they differ); "exact" takes the expectation, a pass for each class and label.
        draws: how many times "sampled" draws the labels of a sample.
        normalization: h_i = g_i / sqrt(T_i) for "per_token", g_i for "none", g_i / T_i for "mean".
    """

    name: ClassVar[str] = "fisher"
    shape: Literal["full", "groups"] = "full"
    labels: FisherLabels | Sequence[FisherLabels] = "data"
    draws: int = 1
    normalization: Normalization = "per_token"

    def __post_init__(self) -> None:
        plain_fields(self)
        if not is_one_of(self.shape, ("full", "groups")):
            raise UsageError(f"Fisher(shape={self.shape!r}): use 'full' or 'groups'")
        if not is_one_of(self.normalization, tuple(NORMALIZATIONS)):
            raise UsageError(
                f"Fisher(normalization={self.normalization!r}): use 'per_token', 'none' or 'mean'"
            )

        known = get_args(FisherLabels)
        several = isinstance(self.labels, Sequence) and not isinstance(self.labels, str)
        sources = tuple(self.labels) if several else (self.labels,)
        wrong = not sources or not all(is_one_of(source, known) for source in sources)
        if wrong or len(set(sources)) != len(sources):
            raise UsageError(
                f"Fisher(labels={self.labels!r}): use 'data', 'sampled' or 'exact', or several of them"
            )
        object.__setattr__(self, "labels", sources)
        if type(self.draws) is not int or self.draws < 1:
            raise UsageError(f"Fisher(draws={self.draws!r}): use a positive number")

    @override
    def collector(self, context: Context) -> Collector:
        return self.collectors(context)[0]

    @override
    def collectors(self, context: Context) -> Sequence[Collector]:
        full = self.shape == "full"
        return [
            FisherCollector(context, full=full)
            if source == "data"
            else LabelledFisherCollector(context, source, draws=self.draws, full=full)
            for source in self.labels
        ]


class FisherCollector(Collector):
    """Sums of h ** 2 and of h, streamed: nothing per sample is kept."""

    def __init__(self, context: Context, *, full: bool) -> None:
        """Zero accumulators in the shape of each parameter, or none at all."""
        self._sums = FullSums(context.parameters if full else {}, "data", mean=True)

    @override
    def sinks(self, parameter: str) -> Sinks:
        return self._sums.sinks(parameter)

    @override
    def update(self, emission: Emission, segment: SegmentWriter | None, start: int) -> None:
        # the pass over the gradients, which the group values share, has filled the sinks
        del segment, start
        self._sums.added(emission)

    @override
    def end(self, segment: SegmentWriter | None, start: int) -> None:
        del segment, start
        self._sums.check()

    @override
    def state(self) -> dict[str, Tensor]:
        return self._sums.state()

    @override
    def load_state(self, arrays: Mapping[str, Tensor]) -> None:
        self._sums.load_state(arrays)
