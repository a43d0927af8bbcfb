"""Whether a model repeats itself: nothing random in a pass, and nothing left from one pass to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fisherscope.instrument.batch import Batch
from fisherscope.instrument.coupling import module_outputs
from fisherscope.instrument.data import Sample
from fisherscope.instrument.objectives import Objective, Predictions

_TOLERANCE = 1e-6  # the same call on the same machine gives the same, to the bit as a rule
_ENTRIES = 512
_TINY = 2  # tokens


@dataclass(frozen=True)
class Outputs:
    """What one sample went through in a forward pass.

    Attributes:
        batch: the sample.
        by_module: a sketch of the first tensor that each module returned, in the order in which they ended.
        losses: ``[1]``.
    """

    batch: Batch
    by_module: dict[str, Tensor]
    losses: Tensor

    @classmethod
    def of(cls, model: nn.Module, objective: Objective, batch: Batch) -> Outputs:
        """Run the sample, without gradients."""
        by_module, found = module_outputs(model, objective, batch, _sketch)
        losses = found.losses(len(batch)) if isinstance(found, Predictions) else found
        return cls(batch, by_module, losses.detach())

    def first_other(self, again: Outputs) -> str | None:
        """The first module that gave something else this time, or "the loss"; None where all is the same."""
        for name, mine in self.by_module.items():
            other = again.by_module.get(name)
            if other is None or not _same(mine, other):
                return name
        return None if _same(self.losses, again.losses) else "the loss"


def probe_rows(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Samples to run again, from the shortest on, and the longest one, which is run between.

    What a pass leaves behind shows only past a length: what is longer than the first time may change a
    model's state, and what is shorter may change it back.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    longest = order[-1]
    shorter = [row for row in order if lengths[row] < lengths[longest]] or order[:1]
    return list(dict.fromkeys((shorter[0], shorter[len(shorter) // 2], shorter[-1]))), longest


def find_state(
    model: nn.Module, objective: Objective, make: Callable[[Sample], Batch], named: Mapping[str, Sample]
) -> str | None:
    """Look for what makes the same sample another one when it is run again.

    Args:
        model: the model, made ready for collection.
        objective: runs it.
        make: a batch of one sample.
        named: the samples of the run by their ids.

    Returns:
        What is wrong, in words, with the first module to give something else; None where nothing is.
    """
    names, samples = list(named), list(named.values())
    chosen, longest = probe_rows([sample.cost for sample in samples])
    run_tiny(model, objective, make, samples[chosen[0]])
    first = [Outputs.of(model, objective, make(samples[row])) for row in chosen]
    again = Outputs.of(model, objective, first[-1].batch)
    if (where := first[-1].first_other(again)) is not None:
        return (
            f"{names[chosen[-1]]} gives something else each time that it is run: random numbers are drawn in "
            f"evaluation mode, or something counts passes. The first to differ is {where}. Switch that off: "
            "a gradient that cannot be had twice is no gradient of the sample"
        )
    with torch.no_grad():
        objective.predict(model, make(samples[longest]))
    for row, before in zip(reversed(chosen), reversed(first), strict=True):
        where = before.first_other(Outputs.of(model, objective, before.batch))
        if where is not None:
            return (
                f"{names[row]} gives something else after {names[longest]}, the longest sample, than before "
                "it: a pass leaves something behind in the model, such as a cache, or frequencies of rotary "
                f"positions that are made anew for longer samples. The first to differ is {where}. Switch "
                "that off (of dynamic rotary scaling choose a kind that does not depend on the length), or "
                "cut samples with max_length to where it does not set in"
            )
    return None


def run_tiny(model: nn.Module, objective: Objective, make: Callable[[Sample], Batch], sample: Sample) -> None:
    """Run the beginning of a sample: what earlier passes have left behind may go away with a short one."""
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
        objective.predict(model, make(tiny))


def _sketch(output: Tensor) -> Tensor:
    """Some entries of a tensor, and the means of all and of their sizes: the whole would be too large."""
    flat = output.detach()
    flat = (torch.view_as_real(flat) if flat.is_complex() else flat).reshape(-1)
    if not len(flat):
        return flat.double().cpu()
    chosen = flat[:: max(1, len(flat) // _ENTRIES)][:_ENTRIES].double()
    means = torch.stack([flat.double().nan_to_num().mean(), flat.double().nan_to_num().abs().mean()])
    return torch.cat([chosen, means]).cpu()


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    finite = one[torch.isfinite(one)].double()
    size = float(finite.abs().max()) if len(finite) else 0.0
    return torch.allclose(
        one.double(), other.double(), rtol=_TOLERANCE, atol=_TOLERANCE * size, equal_nan=True
    )
