"""Signed per-sample gradients, written as they come."""

from __future__ import annotations

import glob
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, get_args

from typing_extensions import override

from fisherscope.errors import CoverageError, UsageError
from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions.base import Collector, Context, Extension
from fisherscope.instrument.extensions.factors import FactorWriter
from fisherscope.instrument.extensions.registry import register_extension
from fisherscope.instrument.patterns import matching, suggestion
from fisherscope.layout import ModelLayout
from fisherscope.linalg import LowRank
from fisherscope.linalg.rounding import rounded
from fisherscope.plain import is_one_of, plain_fields
from fisherscope.store import SegmentWriter
from fisherscope.store.encodings import MAX_RANK, Encodings

Choice = Literal["auto", "dense", "factored", "lowrank", "groups"]
Dtype = Literal["bfloat16", "float32", "float16"]

_WORDS = ("auto", "attention", "all")
# Entries of one sample's gradient that "auto" takes of a model without attention: 32 MiB in bfloat16, between
# those of attention in GPT-2 (small) and in models of few layers.
MOST_ENTRIES = 1 << 24


@register_extension
@dataclass(frozen=True)
class SampleGradients(Extension):
    """g_i of every sample, which conflict and interference analyses read.

    Attributes:
        parameters: "attention", "all" (of the instrumented ones) or a list of name patterns. "auto" is
            "attention" where weights of attention are instrumented. Elsewhere it takes the instrumented
            matrices of the layers, from the first layer on, as long as one sample's gradients have no more
            than 2^24 entries together (32 MiB in bfloat16), and one matrix at least.
        encoding: "dense" keeps g itself. "factored" keeps the layer's input and its output gradient, position
            by position: exact up to the dtype, and smaller where samples are short. "lowrank" keeps the first
            singular vectors of each sample's gradient, with the error of each. "groups" keeps no gradients:
            group values are always there. "auto" takes per parameter the smaller of "dense" and "factored".
            Vectors, convolutions and stacked experts are dense whatever is asked for.
        dtype: "bfloat16" keeps the exponent range of float32 in half the bytes; "float32" keeps all;
            "float16" has a power of two as scale of each row and is 8 times finer than bfloat16. Where
            products of rounded factors cancel, little of an entry is left, so factors that "auto" chooses
            are float32 in place of bfloat16: no square is worse than that of a dense gradient. Half the
            bytes are to be asked for: ``encoding="factored", dtype="float16"``.
        rank: of "lowrank".
        max_samples: gradients of the first so many samples of each task only; None for all.
    """

    name: ClassVar[str] = "sample_gradients"
    parameters: str | Sequence[str] = "auto"
    encoding: Choice = "auto"
    dtype: Dtype = "bfloat16"
    rank: int = 8
    max_samples: int | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        if not isinstance(self.parameters, str):
            patterns = tuple(self.parameters) if isinstance(self.parameters, Sequence) else ()
            if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
                raise UsageError(
                    f"SampleGradients(parameters={self.parameters!r}): use 'auto', 'attention', 'all' or a "
                    "list of name patterns; to store no gradients use encoding='groups'"
                )
            object.__setattr__(self, "parameters", patterns)
        elif self.parameters not in _WORDS:
            raise UsageError(
                f"SampleGradients(parameters={self.parameters!r}): use 'auto', 'attention', 'all' or a list "
                "of name patterns"
            )
        for what, choices in (("encoding", get_args(Choice)), ("dtype", get_args(Dtype))):
            if not is_one_of(value := getattr(self, what), choices):
                offered = ", ".join(map(repr, choices))
                raise UsageError(f"SampleGradients({what}={value!r}): use one of {offered}")
        if type(self.rank) is not int or not 1 <= self.rank <= MAX_RANK:
            raise UsageError(f"SampleGradients(rank={self.rank!r}): use a number from 1 to {MAX_RANK}")
        if self.max_samples is not None and (type(self.max_samples) is not int or self.max_samples < 1):
            raise UsageError(
                f"SampleGradients(max_samples={self.max_samples!r}): use a positive number or None"
            )

    @property
    def factor_dtype(self) -> Dtype:
        """Element type of factors and singular vectors."""
        return "float32" if self.encoding == "auto" and self.dtype == "bfloat16" else self.dtype

    @override
    def settled(self, layout: ModelLayout, instrumented: tuple[str, ...]) -> Self:
        if self.parameters != "auto":
            return self
        if any(layout.parameter(name).kind == "attention" for name in instrumented):
            return replace(self, parameters="attention")
        names = _first_that_fit(layout, instrumented)
        return replace(self, parameters=tuple(glob.escape(name) for name in names))

    def chosen(self, layout: ModelLayout, instrumented: tuple[str, ...]) -> tuple[str, ...]:
        """Which of the instrumented parameters are stored; none with the encoding "groups".

        Raises:
            CoverageError: the choice matches none.
        """
        choice = self.settled(layout, instrumented).parameters
        if choice == "all":
            names = instrumented
        elif choice == "attention":
            names = tuple(n for n in instrumented if layout.parameter(n).kind == "attention")
        else:
            names = matching(instrumented, choice)
        if not names:
            raise CoverageError(
                f"SampleGradients(parameters={self.parameters!r}) matches none of the {len(instrumented)} "
                f"instrumented parameters ({instrumented[0]}, ...). "
                f"{'' if isinstance(choice, str) else suggestion(instrumented, choice)}"
                "Leave parameters out for a choice that "
                "fits the model, or use 'all' or patterns of the names in scope.parameters"
            )
        return () if self.encoding == "groups" else names

    @override
    def collector(self, context: Context) -> Collector:
        return SampleGradientCollector(self.chosen(context.layout, tuple(context.parameters)))


def _first_that_fit(layout: ModelLayout, instrumented: tuple[str, ...]) -> tuple[str, ...]:
    """Matrices of the layers, in model order, whose entries are few enough together; one at least."""
    infos = [layout.parameter(name) for name in instrumented]
    matrices = [info for info in infos if len(info.shape) > 1]
    pool = [info for info in matrices if info.layer >= 0] or matrices or infos
    entries = itertools.accumulate(math.prod(info.shape) for info in pool)
    fit = sum(total <= MOST_ENTRIES for total in entries)
    return tuple(info.name for info in pool[: max(fit, 1)])


class SampleGradientCollector(Collector):
    """Hands each parameter's gradients to the segment, so that none waits for another layer's."""

    def __init__(self, parameters: tuple[str, ...]) -> None:
        """Store the gradients of these parameters, dense unless :meth:`stored_as` says otherwise."""
        self._parameters = frozenset(parameters)
        self.stored_as(Encodings())

    @override
    def stored_as(self, encodings: Encodings) -> None:
        self._encodings = encodings
        self._factors = FactorWriter(encodings)

    @override
    def wants_dense(self, parameter: str) -> bool:
        return parameter in self._parameters and self._encodings.encoding(parameter) == "dense"

    @override
    def begin(self, n: int) -> None:
        self._factors.begin(n)

    @override
    def update(self, emission: Emission, segment: SegmentWriter | None, start: int) -> None:
        name = emission.parameter
        if segment is None or name not in self._parameters or not segment.has_gradients:
            return
        encoding = self._encodings.encoding(name)
        if encoding == "factored":
            self._factors.write(emission, segment, start)
        elif encoding == "lowrank":
            rank, dtype = self._encodings.rank, self._encodings.dtype
            assert rank is not None
            found = LowRank.of(emission.gradient, rank, lambda rows: rounded(rows, dtype, 1))
            segment.gradients.put_low_rank(name, start, found)
        else:
            segment.put_gradient(name, start, emission.dense)

    @override
    def end(self, segment: SegmentWriter | None, start: int) -> None:
        if segment is not None and segment.has_gradients:
            self._factors.end(segment, start)
