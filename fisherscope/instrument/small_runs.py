"""Forward passes of a model on small inputs of two sizes, and the shapes of what its modules are given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fisherscope.adapters.inputs import first_output, probe_inputs
from fisherscope.errors import AdapterError
from fisherscope.instrument.batch_axes import CallShapes
from fisherscope.instrument.forwards import Around, Forward, around
from fisherscope.instrument.replay import without_caches
from fisherscope.instrument.rules import find_rule

SAMPLES = (3, 2)
"""Samples of the small inputs: other numbers than that of their positions, and than one another."""


class SmallRuns:
    """Forward passes of different samples: two numbers of them, without padding and with some."""

    def __init__(self, model: nn.Module, watched: Sequence[nn.Module]) -> None:
        """Run them, and note the shapes of every call of the watched modules.

        Raises:
            AdapterError: the model does not run on a small input.
        """
        self.model = model
        self.watched = watched
        self.calls: list[dict[nn.Module, list[CallShapes]]] = []
        self.plain = self._run(small_batch(model, SAMPLES[0]))
        self._run(small_batch(model, SAMPLES[1]))
        if any(find_rule(module) is None for module in watched):
            # masks are not made where nothing is padded
            try:
                for n in SAMPLES:
                    self._run(small_batch(model, n, padded=True))
            except AdapterError:
                self.calls = self.calls[:2]

    def _run(self, inputs: dict[str, Any]) -> Tensor:
        calls: dict[nn.Module, list[CallShapes]] = defaultdict(list)

        def watch(module: nn.Module) -> Around:
            def call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                output = forward(*args, **kwargs)
                calls[module].append(CallShapes.of(*without_caches(args, kwargs), output))
                return output

            return call

        with ExitStack() as stack:
            for module in self.watched:
                stack.enter_context(around(module, watch(module)))
            with torch.no_grad():
                found = first_output(self.model, inputs)
        self.calls.append(dict(calls))
        return found

    @property
    def called(self) -> set[nn.Module]:
        """Modules that were called."""
        return {module for calls in self.calls for module in calls}

    def has_further_inputs(self, module: nn.Module) -> bool:
        """Whether any call brings a module more than one tensor, such as a norm and its gate."""
        return any(len(call.inputs) > 1 for calls in self.calls for call in calls.get(module, []))

    def pairs(self, module: nn.Module) -> list[tuple[list[CallShapes], list[CallShapes]]]:
        """The calls of a module with the first number of samples and with the second, run by run."""
        return [
            (first.get(module, []), second.get(module, []))
            for first, second in zip(self.calls[::2], self.calls[1::2], strict=True)
        ]

    def again(self, calls: Mapping[nn.Module, Around]) -> Tensor | None:
        """What the first input gives with these calls around the forwards of modules; None if nothing."""
        with ExitStack() as stack:
            for module, call in calls.items():
                stack.enter_context(around(module, call))
            try:
                with torch.no_grad():
                    return first_output(self.model, small_batch(self.model, SAMPLES[0]))
            except AdapterError:
                return None


def small_batch(model: nn.Module, n: int, *, padded: bool = False) -> dict[str, Any]:
    """Keyword arguments of a forward pass of ``n`` different small samples.

    Raises:
        AdapterError: the model takes neither token ids nor images, or, ``padded``, no mask.
    """
    rows = [probe_inputs(model, 1, seed=seed) for seed in range(n)]
    inputs = {
        key: torch.cat([row[key] for row in rows]) if isinstance(value, Tensor) else value
        for key, value in rows[0].items()
    }
    if padded:
        if "attention_mask" not in inputs:
            raise AdapterError(f"{type(model).__name__} takes no attention mask")
        inputs["attention_mask"][1, -2:] = 0
    return inputs
