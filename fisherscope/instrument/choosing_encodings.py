"""How the gradients of each parameter will be stored: settled before the store is created."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fisherscope.instrument.extensions import SampleGradients
from fisherscope.instrument.shared_inputs import Seen
from fisherscope.layout import ModelLayout
from fisherscope.store.encodings import Encodings
from fisherscope.store.position_plan import side_of
from fisherscope.store.size import Lengths, gradient_bytes, row_bytes

logger = logging.getLogger(__name__)

Look = Callable[[Sequence[str]], Seen | None]


@dataclass(frozen=True)
class ChosenEncodings:
    """The encodings of a run.

    Attributes:
        encodings: as in the store's header.
        reason: why, in words and numbers.
    """

    encodings: Encodings = field(default_factory=Encodings)
    reason: str = "no gradients are stored"


def choose_encodings(
    options: SampleGradients | None,
    layout: ModelLayout,
    parameters: tuple[str, ...],
    output_axes: Mapping[str, int],
    lengths: Lengths,
    look: Look,
) -> ChosenEncodings:
    """Choose the encoding of every parameter whose gradients are to be stored.

    Args:
        options: what the user asks for.
        layout: of the model.
        parameters: the instrumented ones.
        output_axes: of the weights of linear maps.
        lengths: mean lengths of the samples of the run.
        look: runs a batch and says what it tells of some weights; None if memory does not suffice for one.
    """
    stored = options.chosen(layout, parameters) if options else ()
    if options is None or not stored:
        return ChosenEncodings()
    chooser = _Chooser(options, layout, stored, output_axes, lengths)
    if options.encoding == "dense":
        return ChosenEncodings(reason="dense: as asked for")
    found = chooser.low_rank() if options.encoding == "lowrank" else chooser.factored(look)
    logger.info("encoding of gradients: %s", found.reason)
    return found


@dataclass(frozen=True)
class _Chooser:
    options: SampleGradients
    layout: ModelLayout
    stored: tuple[str, ...]
    output_axes: Mapping[str, int]
    lengths: Lengths

    def low_rank(self) -> ChosenEncodings:
        """Low rank wherever that takes fewer bytes."""
        rank = self.options.rank
        names = [
            name
            for name in self.stored
            if name in self.output_axes and rank * sum(self._shape(name)) < math.prod(self._shape(name))
        ]
        encodings = Encodings(
            dict.fromkeys(names, "lowrank"), rank=rank if names else None, dtype=self.options.factor_dtype
        )
        return self._with_reason(encodings, {}, f"rank {rank}, as asked for")

    def factored(self, look: Look) -> ChosenEncodings:
        """Factors of all matrices that have them, or with "auto" of those where they take fewer bytes."""
        is_auto = self.options.encoding == "auto"
        names = [name for name in self.stored if name in self.output_axes]
        names = [name for name in names if side_of(self.layout, name) is not None]
        if is_auto:
            # others would take more even if their input cost nothing
            names = [name for name in names if self._pays([name], with_input=False)]
        seen = look(names) if names else None
        reasons = {} if seen is None else seen.reasons
        names = [n for n in names if seen is not None and n in seen.inputs and n not in reasons]
        groups: dict[tuple[object, ...], list[str]] = {}
        for name in names:
            assert seen is not None
            width = self._shape(name)[1 - self.output_axes[name]]
            groups.setdefault((seen.inputs[name], side_of(self.layout, name), width), []).append(name)
        kept = [group for group in groups.values() if not is_auto or self._pays(group)]
        inputs = {name: group[0] for group in kept for name in group}
        why = f"{self.lengths.inputs:.1f} attended positions on average" if is_auto else "as asked for"
        return self._with_reason(self._encoded([n for n in names if n in inputs], inputs), reasons, why)

    def _pays(self, group: list[str], *, with_input: bool = True) -> bool:
        """Whether the factors of weights with one input take fewer bytes than their gradients."""
        axis, shape = self.output_axes[group[0]], self._shape(group[0])
        columns = [shape[1 - axis]] * with_input + [self._shape(n)[self.output_axes[n]] for n in group]
        is_target = side_of(self.layout, group[0]) == "target"
        positions = self.lengths.targets if is_target else self.lengths.inputs
        factors = positions * sum(row_bytes(width, self.options.factor_dtype) for width in columns)
        return factors < sum(row_bytes(math.prod(self._shape(name)), self.options.dtype) for name in group)

    def _encoded(self, names: Sequence[str], inputs: Mapping[str, str]) -> Encodings:
        return Encodings(
            dict.fromkeys(names, "factored"),
            {name: inputs[name] for name in names},
            tuple(name for name in names if self.output_axes[name] == 1),
            dtype=self.options.factor_dtype,
        )

    def _bytes(self, encodings: Encodings, names: Sequence[str]) -> float:
        return gradient_bytes(self.layout, names, self.options.dtype, encodings, self.lengths)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.layout.parameter(name).shape

    def _with_reason(self, encodings: Encodings, reasons: Mapping[str, str], why: str) -> ChosenEncodings:
        taken, dense = (self._bytes(kind, self.stored) for kind in (encodings, Encodings()))
        if encodings.of:
            kind = next(iter(encodings.of.values()))
            shared = len(set(encodings.inputs.values()))
            inputs = f", {shared} inputs" if shared else ""
            text = (
                f"{len(encodings.of)} of {len(self.stored)} parameters {kind} in {encodings.dtype}{inputs} "
                f"({why}), the others dense: {taken:,.0f} bytes a sample, {dense:,.0f} if all were dense"
            )
        else:
            text = f"dense ({why}): {dense:,.0f} bytes a sample, and no other encoding takes fewer"
        for name, reason in list(reasons.items())[:3]:
            text += f"; {name} is dense as {reason}"
        return ChosenEncodings(encodings, text)
