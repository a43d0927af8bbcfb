"""Kronecker factors of the Fisher of linear maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fisherscope.errors import NonFiniteError
from fisherscope.instrument.by_position import ByPosition, NotByPosition
from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions.base import Collector, Context, Extension
from fisherscope.instrument.extensions.choice import Choice, checked_choice, none_chosen
from fisherscope.instrument.extensions.registry import register_extension
from fisherscope.instrument.patterns import matching
from fisherscope.instrument.squares import Scale
from fisherscope.layout import ModelLayout
from fisherscope.linalg import RunningSum
from fisherscope.store import SegmentWriter

_MOST_NAMED = 8


@register_extension
@dataclass(frozen=True)
class Kronecker(Extension):
    """A = mean of a a' and S = mean of (1 / T_i) sum_t d_t d_t' of every instrumented linear map.

    The formula is that of :class:`~fisherscope.store.kronecker.KroneckerFactors`, which
    ``store.kronecker(task, module)`` returns: K-FAC (Martens & Grosse 2015) in the "expand" convention. A
    has a row and column for the bias where that is instrumented. Padding is left out. What has no factors,
    such as routed experts, is named in a warning.

    Each map takes ``6 (in^2 + out^2)`` bytes on its device and, per task, in the store.

    Attributes:
        parameters: "all" (instrumented ones), "attention" or a list of name patterns of weights.
    """

    name: ClassVar[str] = "kronecker"
    parameters: Choice = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", checked_choice("Kronecker", self.parameters))

    def chosen(self, layout: ModelLayout, instrumented: Sequence[str]) -> tuple[str, ...]:
        """Weights whose factors are collected, as far as they have any.

        Raises:
            CoverageError: there is none.
        """
        names = tuple(name for name in instrumented if len(layout.parameter(name).shape) > 1)
        if self.parameters == "attention":
            names = tuple(name for name in names if layout.parameter(name).kind == "attention")
        elif not isinstance(self.parameters, str):
            names = matching(names, self.parameters)
        if not names:
            raise none_chosen("Kronecker", self.parameters, instrumented)
        return names

    @override
    def collector(self, context: Context) -> Collector:
        return KroneckerCollector(context, frozenset(self.chosen(context.layout, tuple(context.parameters))))


@dataclass
class _Sums:
    """Running sums of one map, in units of powers of two.

    Attributes:
        A: sum of a a' over positions.
        S: sum over samples of (1 / T_i) sum_t d_t d_t'.
        scales: of a and of d.
        positions: terms in A.
    """

    A: RunningSum
    S: RunningSum
    scales: tuple[Scale, Scale] = field(default_factory=lambda: (Scale(), Scale()))
    positions: int = 0

    def add(self, found: ByPosition, tokens: Tensor) -> None:
        """Add the positions of a batch, of which ``tokens [n]`` are the T_i."""
        terms = found.terms
        chosen = terms.flatten().nonzero().squeeze(1)
        a = found.inputs.flatten(0, 1)[chosen].float()
        d = found.output_gradients.flatten(0, 1)[chosen].float()
        if len(self.A.value) > a.shape[1]:
            a = torch.cat([a, a.new_ones(len(a), 1)], 1)
        weights = tokens.to(d.device, torch.float32).reciprocal()[chosen // terms.shape[1]]
        for into, rows, scale, factors in (
            (self.A, a, self.scales[0], None),
            (self.S, d, self.scales[1], weights),
        ):
            scale.fix_by(rows)
            scaled = rows * 2.0**scale.exponent if scale.exponent else rows
            into.add(scaled.T @ (scaled if factors is None else scaled * factors.unsqueeze(1)))
        self.positions += len(chosen)


class KroneckerCollector(Collector):
    """Sums of outer products of inputs and of output gradients, map by map."""

    def __init__(self, context: Context, parameters: frozenset[str]) -> None:
        """Collect the factors of those of these parameters that are weights of linear maps."""
        self._context = context
        self._parameters = parameters
        self._sums: dict[str, _Sums] = {}
        self._left_out: set[str] = set()
        self._lacking: dict[str, str] = {}

    @override
    def update(self, emission: Emission, segment: SegmentWriter | None, start: int) -> None:
        del segment, start
        name = emission.parameter
        if name not in self._parameters:
            return
        module = name.rpartition(".")[0]
        found = emission.by_position
        if isinstance(found, NotByPosition):
            # from now on, too: a sum over some of the batches would be one of other samples
            self._left_out.add(module)
            self._sums.pop(module, None)
            if found.is_linear_map or self._is_expected(name):
                self._lacking[name] = found.reason
        elif module not in self._left_out:
            if module not in self._sums:
                self._sums[module] = self._zeros(module, found)
            self._sums[module].add(found, emission.batch.tokens)

    def _zeros(self, module: str, found: ByPosition) -> _Sums:
        inputs, outputs = found.inputs.shape[2], found.output_gradients.shape[2]
        inputs += f"{module}.bias" in self._context.parameters
        device = found.inputs.device
        zeros = [RunningSum.zeros(size, size, device=device) for size in (inputs, outputs)]
        return _Sums(zeros[0], zeros[1])

    def _is_expected(self, name: str) -> bool:
        """Whether a parameter that is no linear map by itself does what one does: experts, convolutions."""
        info = self._context.layout.parameter(name)
        return info.kind in {"experts", "router"} or len(info.shape) == 4

    @override
    def end(self, segment: SegmentWriter | None, start: int) -> None:
        del segment, start
        self._check()
        if self._lacking:
            by_reason: dict[str, list[str]] = {}
            for name, reason in sorted(self._lacking.items()):
                by_reason.setdefault(reason, []).append(name)
            named = "; ".join(f"{_listed(names)}: {reason}" for reason, names in by_reason.items())
            self._context.warn_once(f"no Kronecker factors are collected of {named}")

    def _check(self) -> None:
        for module, sums in self._sums.items():
            if not all(torch.isfinite(into.value.diagonal()).all() for into in (sums.A, sums.S)):
                raise NonFiniteError(
                    f"the Kronecker factors of {module} overflow: what it is given, or the gradient of what "
                    "it gives, has grown so much since the first batch that float32 cannot hold both. Leave "
                    "out the samples whose losses explode, or the map with Kronecker(parameters=[...])"
                )

    @override
    def state(self) -> dict[str, Tensor]:
        arrays: dict[str, Tensor] = {}
        for module, sums in self._sums.items():
            arrays |= sums.A.arrays(f"kronecker/A/{module}") | sums.S.arrays(f"kronecker/S/{module}")
            exponents = [scale.exponent for scale in sums.scales]
            arrays[f"kronecker/exponents/{module}"] = torch.tensor(exponents, dtype=torch.int64, device="cpu")
            arrays[f"kronecker/positions/{module}"] = torch.tensor(
                [sums.positions], dtype=torch.int64, device="cpu"
            )
        return arrays

    @override
    def load_state(self, arrays: Mapping[str, Tensor]) -> None:
        for name in self._parameters:
            module = name.rpartition(".")[0]
            if f"kronecker/A/{module}" not in arrays:
                self._left_out.add(module)
                continue
            device = self._context.parameters[name].device
            self._sums[module] = _loaded(arrays, module, device)


def _loaded(arrays: Mapping[str, Tensor], module: str, device: torch.device) -> _Sums:
    """The sums of a map as they were stored."""
    sums, scales = [], []
    for part, exponent in zip("AS", arrays[f"kronecker/exponents/{module}"].tolist(), strict=True):
        name = f"kronecker/{part}/{module}"
        sums.append(RunningSum.zeros(*arrays[name].shape, device=device))
        more = sums[-1].load(arrays, name) // 2
        scales.append(Scale(int(exponent) + more, is_fixed=sums[-1].largest() > 0))
    positions = int(arrays[f"kronecker/positions/{module}"])
    return _Sums(sums[0], sums[1], (scales[0], scales[1]), positions)


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
