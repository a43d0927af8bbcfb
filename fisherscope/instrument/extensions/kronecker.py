"""Kronecker factors of the Fisher of linear maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fisherscope.instrument.by_position import ByPosition, NotByPosition
from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions.base import Collector, Context, Extension
from fisherscope.instrument.extensions.choice import Choice, checked_choice, none_chosen
from fisherscope.instrument.extensions.registry import register_extension
from fisherscope.layout import ModelLayout
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

    Each map takes ``4 (in^2 + out^2)`` bytes on its device and, per task, in the store.

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
            patterns = tuple(self.parameters)
            names = tuple(name for name in names if any(fnmatchcase(name, p) for p in patterns))
        if not names:
            raise none_chosen("Kronecker", self.parameters)
        return names

    @override
    def collector(self, context: Context) -> Collector:
        return KroneckerCollector(context, frozenset(self.chosen(context.layout, tuple(context.parameters))))


@dataclass
class _Sums:
    """Running sums of one map.

    Attributes:
        A: sum of a a' over positions, float32.
        S: sum over samples of (1 / T_i) sum_t d_t d_t', float32.
        positions: terms in A.
    """

    A: Tensor
    S: Tensor
    positions: int = 0

    def add(self, found: ByPosition, tokens: Tensor) -> None:
        """Add the positions of a batch, of which ``tokens [n]`` are the T_i."""
        terms = found.terms
        chosen = terms.flatten().nonzero().squeeze(1)
        a = found.inputs.flatten(0, 1)[chosen].float()
        d = found.output_gradients.flatten(0, 1)[chosen].float()
        if len(self.A) > a.shape[1]:
            a = torch.cat([a, a.new_ones(len(a), 1)], 1)
        weights = tokens.to(d.device, torch.float32).reciprocal()[chosen // terms.shape[1]]
        self.A.addmm_(a.T, a)
        self.S.addmm_(d.T, d * weights.unsqueeze(1))
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
        return _Sums(
            torch.zeros(inputs, inputs, device=device, dtype=torch.float32),
            torch.zeros(outputs, outputs, device=device, dtype=torch.float32),
        )

    def _is_expected(self, name: str) -> bool:
        """Whether a parameter that is no linear map by itself does what one does: experts, convolutions."""
        info = self._context.layout.parameter(name)
        return info.kind in {"experts", "router"} or len(info.shape) == 4

    @override
    def end(self, segment: SegmentWriter | None, start: int) -> None:
        del segment, start
        if self._lacking:
            by_reason: dict[str, list[str]] = {}
            for name, reason in sorted(self._lacking.items()):
                by_reason.setdefault(reason, []).append(name)
            named = "; ".join(f"{_listed(names)}: {reason}" for reason, names in by_reason.items())
            self._context.warn_once(f"no Kronecker factors are collected of {named}")

    @override
    def state(self) -> dict[str, Tensor]:
        arrays: dict[str, Tensor] = {}
        for module, sums in self._sums.items():
            arrays[f"kronecker/A/{module}"] = sums.A.cpu()
            arrays[f"kronecker/S/{module}"] = sums.S.cpu()
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
            self._sums[module] = _Sums(
                arrays[f"kronecker/A/{module}"].to(device, torch.float32, copy=True),
                arrays[f"kronecker/S/{module}"].to(device, torch.float32, copy=True),
                int(arrays[f"kronecker/positions/{module}"]),
            )


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
