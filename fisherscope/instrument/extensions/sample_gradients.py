"""Signed per-sample gradients, written as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from typing_extensions import override

from fisherscope.errors import CoverageError
from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions.base import Collector, Context, Extension
from fisherscope.instrument.extensions.registry import register_extension
from fisherscope.layout import ModelLayout
from fisherscope.store import SegmentWriter


@register_extension
@dataclass(frozen=True)
class SampleGradients(Extension):
    """g_i of every sample, which conflict and interference analyses read.

    Attributes:
        parameters: "attention", "all" (of the instrumented ones) or a list of name patterns.
        dtype: "bfloat16" keeps the exponent range of float32 in half the bytes; "float32" keeps all.
    """

    name: ClassVar[str] = "sample_gradients"
    parameters: str | Sequence[str] = "attention"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        if not isinstance(self.parameters, str):
            object.__setattr__(self, "parameters", tuple(self.parameters))
        elif self.parameters not in {"attention", "all"}:
            raise ValueError(
                f"SampleGradients(parameters={self.parameters!r}): use 'attention', 'all' or name patterns"
            )
        if self.dtype not in {"bfloat16", "float32"}:
            raise ValueError(f"SampleGradients(dtype={self.dtype!r}): use 'bfloat16' or 'float32'")

    def chosen(self, layout: ModelLayout, instrumented: tuple[str, ...]) -> tuple[str, ...]:
        """Which of the instrumented parameters are stored.

        Raises:
            CoverageError: none is.
        """
        if self.parameters == "all":
            names = instrumented
        elif self.parameters == "attention":
            names = tuple(n for n in instrumented if layout.parameter(n).kind == "attention")
        else:
            names = tuple(n for n in instrumented if any(fnmatchcase(n, p) for p in self.parameters))
        if not names:
            raise CoverageError(
                f"SampleGradients(parameters={self.parameters!r}) matches none of the instrumented parameters"
            )
        return names

    @override
    def collector(self, context: Context) -> Collector:
        return SampleGradientCollector(self.chosen(context.layout, tuple(context.parameters)))


class SampleGradientCollector(Collector):
    """Hands each parameter's gradients to the segment, so that none waits for another layer's."""

    def __init__(self, parameters: tuple[str, ...]) -> None:
        """Store the gradients of these parameters."""
        self._parameters = frozenset(parameters)

    @override
    def wants_dense(self, parameter: str) -> bool:
        return parameter in self._parameters

    @override
    def update(self, emission: Emission, segment: SegmentWriter | None, start: int) -> None:
        if segment is not None and emission.parameter in self._parameters:
            segment.put_gradient(emission.parameter, start, emission.dense)
