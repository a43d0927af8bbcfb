"""What hooks will see of each module, found out on a small input before anything is collected."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherscope.adapters.inputs import POSITIONS, first_output, probe_inputs
from fisherscope.errors import AdapterError
from fisherscope.instrument.lookup import has_samples
from fisherscope.instrument.reference import tracked
from fisherscope.instrument.replay import Samples, is_replayable
from fisherscope.instrument.rules import find_rule

_ROWS = 3  # samples of the small input: another number than that of its positions


@dataclass(frozen=True)
class Trial:
    """What was found out.

    Attributes:
        unseen: parameter -> why hooks cannot see its per-sample gradients.
        replayable: modules without a rule whose calls can be run again sample by sample.
    """

    unseen: dict[str, str]
    replayable: frozenset[nn.Module]


def try_out(
    model: nn.Module,
    modules: Mapping[str, Sequence[nn.Module]],
    every_position: Collection[nn.Module] | None = None,
) -> Trial:
    """Run a small input, and look at the calls of the modules that hold the parameters.

    Mamba multiplies with the weight of a projection that it never calls; T5's table of position biases is
    looked up once for all samples and pairs of positions.

    Args:
        model: a transformers model.
        modules: the modules of each parameter.
        every_position: those that are given every position of every sample in order, so that samples and
            positions may lie along one axis; None for all.

    Returns:
        What was found; nothing where the model does not run on a small input.
    """
    watch = _Watch(every_position)
    with ExitStack() as stack:
        for module in {m for owners in modules.values() for m in owners}:
            stack.callback(module.register_forward_hook(watch, with_kwargs=True).remove)
        try:
            first_output(model, probe_inputs(model, _ROWS, seed=0))
        except AdapterError:
            return Trial({}, frozenset())
    mixing = {_numberless(name) for name, owners in modules.items() if not watch.mixing.isdisjoint(owners)}
    # an expert that was given as many rows as there are samples, or none, is no other than its siblings
    unseen = {
        name: "its module mixes samples with positions"
        for name in modules
        if _numberless(name) in mixing and watch.looks_at_rows(modules[name])
    }
    uncalled = [name for name, owners in modules.items() if watch.called.isdisjoint(owners)]
    unseen |= dict.fromkeys(_with_gradient(model, uncalled), "used without a call of its module")
    paths = {module: _numberless(path) for path, module in model.named_modules()}
    # an expert whose rows happen to be as many as those of samples is no other than its siblings, either
    failed = {paths[module] for module in watch.not_replayable}
    replayable = {module for module in watch.replayable if paths[module] not in failed}
    return Trial(unseen, frozenset(replayable))


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)


class _Watch:
    """A forward hook that takes note of what it sees."""

    def __init__(self, every_position: Collection[nn.Module] | None) -> None:
        self._every_position = every_position
        self.called: set[nn.Module] = set()
        self.mixing: set[nn.Module] = set()
        self.in_order: set[nn.Module] = set()
        self.replayable: set[nn.Module] = set()
        self.not_replayable: set[nn.Module] = set()
        self._is_silent = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._is_silent:
            return
        self.called.add(module)
        rule = find_rule(module)
        if rule is None:
            with self._silence():
                good = is_replayable(module, args, kwargs, output, Samples(_ROWS, (POSITIONS,)))
            (self.replayable if good else self.not_replayable).add(module)
            return
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if given is None:
            return
        may_be_flat = self._every_position is None or module in self._every_position
        flat = may_be_flat and given.dim() == 2 and given.shape[0] == _ROWS * POSITIONS
        if not (has_samples(given, _ROWS) if rule.looks_up else given.shape[0] == _ROWS or flat):
            self.mixing.add(module)
        elif given.dim() > 2:
            self.in_order.add(module)

    def looks_at_rows(self, owners: Sequence[nn.Module]) -> bool:
        """Whether a layer was given rows that may be any samples' positions, or was not called at all."""
        return not self.mixing.isdisjoint(owners) or self.in_order.isdisjoint(owners)

    @contextmanager
    def _silence(self) -> Iterator[None]:
        self._is_silent = True
        try:
            yield
        finally:
            self._is_silent = False


def _with_gradient(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Which of the parameters have a gradient that is not zero, on a small input."""
    if not names:
        return []
    parameters = [model.get_parameter(name) for name in names]
    with tracked(parameters), torch.enable_grad():
        output = first_output(model, probe_inputs(model, 1, seed=0))
        weights = torch.randn(
            output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
        ).to(output)
        total = (output * weights).sum()
        if not total.requires_grad:
            return []
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return [name for name, g in zip(names, gradients, strict=True) if g is not None and bool(g.any())]
