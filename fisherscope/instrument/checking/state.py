"""Whether a model repeats itself: nothing random in a pass, and nothing left from one pass to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fisherscope.instrument.batch import Batch
from fisherscope.instrument.checking.proof import backward_with
from fisherscope.instrument.coupling import module_outputs
from fisherscope.instrument.data import Sample
from fisherscope.instrument.objectives import Objective, Predictions
from fisherscope.instrument.reference import tracked

_TOLERANCE = 1e-6  # the same call on the same machine gives the same, to the bit as a rule
_TOLERANCE_OF_GRADIENTS = 1e-5  # sums on a GPU may come in any order
_ENTRIES = 512
_TINY = 2  # tokens


@dataclass(frozen=True)
class Outputs:
    """What one sample went through in a forward pass.

    Attributes:
        by_module: a sketch of the first tensor that each module returned, in the order in which they ended.
        losses: ``[1]``.
    """

    by_module: dict[str, Tensor]
    losses: Tensor

    def has_other_losses(self, again: Outputs) -> bool:
        """Whether the sample has another loss this time."""
        return not _same(self.losses, again.losses, _TOLERANCE)

    def first_other(self, again: Outputs) -> str | None:
        """The first module that gave something else this time, or "the loss"; None where all is the same."""
        for name, mine in self.by_module.items():
            other = again.by_module.get(name)
            if other is None or not _same(mine, other, _TOLERANCE):
                return name
        return "the loss" if self.has_other_losses(again) else None


@dataclass(frozen=True)
class Repetition:
    """Runs samples of a run again, one at a time.

    Attributes:
        model: the model, made ready for collection.
        parameters: those whose gradients are to be had.
        objective: runs the model.
        make: a batch of one sample.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    objective: Objective
    make: Callable[[Sample], Batch]

    def find_state(self, named: Mapping[str, Sample]) -> str | None:
        """Look for what makes the same sample another one when it is run again.

        Another loss is another sample. Where only outputs of modules are others, as those of a counter or of
        random numbers that nothing uses, the gradients decide.

        Args:
            named: the samples of the run by their ids.

        Returns:
            What is wrong, in words, with the first module to give something else; None where nothing is.
        """
        names, samples = list(named), list(named.values())
        chosen, longest = probe_rows([sample.cost for sample in samples])
        last = samples[chosen[-1]]
        self._run_tiny(samples[chosen[0]])
        first = [self._outputs(samples[row]) for row in chosen]
        again = self._outputs(last)
        if where := self._first_other(first[-1], again, last, lambda: None):
            return (
                f"{names[chosen[-1]]} gives something else each time that it is run: random numbers are "
                f"drawn in evaluation mode, or something counts passes. The first to differ is {where}. "
                "Switch that off: a gradient that cannot be had twice is no gradient of the sample"
            )

        def run_longest() -> None:
            with torch.no_grad():
                self.objective.run(self.model, self.make(samples[longest]))

        run_longest()
        for row, before in zip(reversed(chosen), reversed(first), strict=True):
            again = self._outputs(samples[row])
            if where := self._first_other(before, again, samples[row], run_longest):
                return (
                    f"{names[row]} gives something else after {names[longest]}, the longest sample, than "
                    "before it: a pass leaves something behind in the model, such as a cache, or frequencies "
                    "of rotary positions that are made anew for longer samples. The first to differ is "
                    f"{where}. Switch that off (of dynamic rotary scaling choose a kind that does not depend "
                    "on the length), or cut samples with max_length to where it does not set in"
                )
        return None

    def _first_other(
        self, before: Outputs, again: Outputs, sample: Sample, between: Callable[[], None]
    ) -> str | None:
        """The first module to give something else, where the loss or the gradients are others, too."""
        where = before.first_other(again)
        if where is None or before.has_other_losses(again):
            return where
        self._run_tiny(sample)
        first = self._gradients(sample)
        between()
        second = self._gradients(sample)
        same = first.keys() == second.keys() and all(
            _same(gradient, second[name], _TOLERANCE_OF_GRADIENTS) for name, gradient in first.items()
        )
        return None if same else where

    def _outputs(self, sample: Sample) -> Outputs:
        """Run a sample without gradients."""
        by_module, found = module_outputs(self.model, self.objective, self.make(sample), _sketch)
        losses = found.losses(1) if isinstance(found, Predictions) else found
        return Outputs(by_module, losses.detach())

    def _gradients(self, sample: Sample) -> dict[str, Tensor]:
        """A sketch of each part of each parameter's gradient."""
        found: dict[str, Tensor] = {}

        def take(name: str, gradient: Tensor) -> None:
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            found[f"{name} {sum(key.startswith(f'{name} ') for key in found)}"] = _sketch(dense)

        with tracked(self.parameters.values()):
            losses = self.objective.losses(self.model, self.make(sample))
            backward_with(losses.sum(), self.parameters, take)
        return found

    def _run_tiny(self, sample: Sample) -> None:
        """Run the beginning of a sample: what earlier passes left behind may go away with a short one."""
        if len(sample.input_ids) <= _TINY:
            return
        beside = sample.labelling in {"next", "position"}
        tiny = replace(
            sample,
            input_ids=sample.input_ids[:_TINY],
            labels=sample.labels[:_TINY] if beside else sample.labels,
            token_types=None if sample.token_types is None else sample.token_types[:_TINY],
        )
        # an objective of the user's own may want more than that: it is only a try
        with torch.no_grad(), suppress(Exception):
            self.objective.run(self.model, self.make(tiny))


def probe_rows(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Samples to run again, from the shortest on, and the longest one, which is run between.

    What a pass leaves behind shows only past a length: what is longer than the first time may change a
    model's state, and what is shorter may change it back.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    longest = order[-1]
    shorter = [row for row in order if lengths[row] < lengths[longest]] or order[:1]
    return list(dict.fromkeys((shorter[0], shorter[len(shorter) // 2], shorter[-1]))), longest


def _sketch(output: Tensor) -> Tensor:
    """Some entries of a tensor, and the means of all and of their sizes: the whole would be too large."""
    flat = output.detach()
    flat = (torch.view_as_real(flat) if flat.is_complex() else flat).reshape(-1)
    if not len(flat):
        return flat.double().cpu()
    chosen = flat[:: max(1, len(flat) // _ENTRIES)][:_ENTRIES].double()
    means = torch.stack([flat.double().nan_to_num().mean(), flat.double().nan_to_num().abs().mean()])
    return torch.cat([chosen, means]).cpu()


def _same(one: Tensor, other: Tensor, tolerance: float) -> bool:
    if one.shape != other.shape:
        return False
    finite = one[torch.isfinite(one)].double()
    size = float(finite.abs().max()) if len(finite) else 0.0
    return torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance * size, equal_nan=True)
