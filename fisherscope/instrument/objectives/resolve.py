"""From the ``objective`` argument to a function of model and batch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fisherscope.instrument.batch import Batch
from fisherscope.instrument.objectives.causal_lm import causal_lm

Objective = Callable[[nn.Module, Batch], Tensor]

_NAMED: dict[str, Objective] = {"causal_lm": causal_lm}


def resolve_objective(choice: str | Objective) -> tuple[str, Objective]:
    """Name and function of an objective.

    Args:
        choice: "auto", a name, or a function ``loss(model, batch) -> [n]`` that returns the sum of each
            sample's losses.

    Raises:
        ValueError: no objective of that name.
    """
    if callable(choice):
        module, name = getattr(choice, "__module__", ""), getattr(choice, "__qualname__", repr(choice))
        return f"{module}.{name}", choice
    if choice == "auto":
        choice = "causal_lm"
    if choice not in _NAMED:
        raise ValueError(
            f"no objective {choice!r}: use 'auto', one of {sorted(_NAMED)}, "
            "or a function loss(model, batch) -> [n]"
        )
    return choice, _NAMED[choice]
