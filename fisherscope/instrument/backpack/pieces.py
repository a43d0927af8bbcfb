"""Per-sample gradients of parameters that are used several times, added up before anything is squared."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fisherscope.errors import FisherscopeError
from fisherscope.instrument.backpack.calls import graph_task
from fisherscope.linalg import PerSampleGradient, added


@dataclass(frozen=True)
class _Piece:
    gradient: PerSampleGradient
    task: int
    is_repeated: bool


class Pieces:
    """What the calls of one forward pass have brought so far, by parameter."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._held: dict[nn.Parameter, _Piece] = {}
        self._taken: dict[nn.Parameter, bool] = {}

    def clear(self) -> None:
        """Another forward pass begins."""
        self._held.clear()
        self._taken.clear()

    def add(self, parameter: nn.Parameter, gradient: PerSampleGradient, *, is_repeated: bool) -> None:
        """One call's gradients.

        Args:
            parameter: whose they are.
            gradient: of the samples.
            is_repeated: the call was made in a backward pass, by reentrant checkpointing, which runs a
                backward pass of its own within the other.
        """
        task, held = graph_task(), self._held.get(parameter)
        # what another backward pass has left, which did not go as far as to the parameter, is not of this one
        if held is not None and (held.task == task or is_repeated):
            gradient, is_repeated = added(held.gradient, gradient), is_repeated or held.is_repeated
        self._held[parameter] = _Piece(gradient, task, is_repeated)

    def take(self, parameter: nn.Parameter, name: str) -> PerSampleGradient | None:
        """The sum of the pieces; None where no call has brought any.

        Raises:
            FisherscopeError: some of them were taken before, so that this sum is a part.
        """
        held = self._held.pop(parameter, None)
        if held is None or (held.task != graph_task() and not held.is_repeated):
            return None
        if parameter in self._taken and (held.is_repeated or self._taken[parameter]):
            raise FisherscopeError(
                f"the gradient of {name} comes in several parts, because reentrant checkpointing runs "
                "several backward passes: use checkpointing with use_reentrant=False"
            )
        self._taken[parameter] = held.is_repeated
        return held.gradient
