"""Sums in the shape of parameters: compensated, and with a power of two as scale of each parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fisherscope.errors import NonFiniteError
from fisherscope.instrument.emission import Emission
from fisherscope.instrument.squares import Scale, Sinks
from fisherscope.linalg import RunningSum

_ROOM = 2.0**126  # below it, no entry of a sum can have overflowed


class FullSums:
    """Sums of h ** 2, and perhaps of h, of every parameter.

    Which arrays they are in a snapshot, and what they mean, is said in docs/store-format.md.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], labels: str, *, mean: bool) -> None:
        """Sums of nothing.

        Args:
            parameters: by name, in the order of the store's header.
            labels: the label source under which the Fisher is kept.
            mean: whether h is added up, too.
        """
        self._labels = labels
        self._sinks = {
            name: Sinks(
                RunningSum.zeros(*p.shape, device=p.device),
                RunningSum.zeros(*p.shape, device=p.device) if mean else None,
            )
            for name, p in parameters.items()
        }
        self._added: dict[str, Tensor] = {}  # since the start, in units of the scales: bounds of all entries

    def sinks(self, parameter: str) -> Sinks:
        """What is to be filled for this parameter."""
        return self._sinks.get(parameter, Sinks())

    def added(self, emission: Emission) -> None:
        """Note how much a batch has added: its squares are in the sinks by now."""
        sinks = self._sinks.get(emission.parameter)
        if sinks is not None:
            whole = [member.partition for member in emission.members].index(None)
            norms = emission.square_norms[whole].sum() * 4.0**sinks.scale.exponent
            before = self._added.get(emission.parameter)
            self._added[emission.parameter] = norms if before is None else before + norms

    def check(self) -> None:
        """That no sum has overflowed.

        Under the data's labels gradients that are not finite are left to the check of the batch's group
        values, which names the sample.

        Raises:
            NonFiniteError: one has, or gradients under other labels are not finite; the message names the
                parameter.
        """
        if not self._added:
            return
        values = torch.stack([value.cpu() for value in self._added.values()])
        for name, value in zip(self._added, values.tolist(), strict=True):
            square = self._sinks[name].square
            if value < _ROOM or square is None or bool(torch.isfinite(square.value).all()):
                continue
            if not math.isfinite(value):
                if self._labels == "data":
                    continue
                raise NonFiniteError(
                    f"the gradient with respect to {name} under labels={self._labels!r} is not finite: leave "
                    "out the samples with extreme predictions, or load the model in a dtype of larger range"
                )
            scale = self._sinks[name].scale.exponent
            raise NonFiniteError(
                f"the sum of squared gradients of {name} overflows: its gradients have grown so much since "
                f"the first batch of the task, which fixed 2 ** {scale} as their scale, that one sum in "
                "float32 cannot hold both. Look at the losses of the last samples; leave out those whose "
                "losses explode, or collect them as a task of their own"
            )

    def state(self) -> dict[str, Tensor]:
        """Arrays of a snapshot; they may be the live accumulators."""
        arrays: dict[str, Tensor] = {}
        for name, sinks in self._sinks.items():
            for prefix, into in self._named(sinks):
                arrays |= into.arrays(f"{prefix}/{name}")
        if arrays:
            exponents = [sinks.scale.exponent for sinks in self._sinks.values()]
            arrays[f"exponents/{self._labels}"] = torch.tensor(exponents, dtype=torch.int64, device="cpu")
        return arrays

    def load_state(self, arrays: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave, or from what ``finalize`` made of it."""
        if not self._sinks:
            return
        exponents = arrays[f"exponents/{self._labels}"].tolist()
        for exponent, (name, sinks) in zip(exponents, self._sinks.items(), strict=True):
            assert sinks.square is not None
            more = sinks.square.load(arrays, f"fisher/{self._labels}/{name}")
            if sinks.total is not None:
                sinks.total.load(arrays, f"mean/{name}", more // 2)
            largest = sinks.square.largest()
            sinks.scale = Scale(int(exponent) + more // 2, is_fixed=largest > 0)
            self._added[name] = torch.tensor(largest, dtype=torch.float64, device="cpu")

    def _named(self, sinks: Sinks) -> list[tuple[str, RunningSum]]:
        offered = ((f"fisher/{self._labels}", sinks.square), ("mean", sinks.total))
        return [(prefix, into) for prefix, into in offered if into is not None]
