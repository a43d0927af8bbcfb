"""What will be seen of each module, found out on small inputs before anything is collected."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fisherscope.adapters.inputs import POSITIONS, first_output, probe_inputs
from fisherscope.errors import AdapterError
from fisherscope.instrument.batch_axes import (
    CallAxes,
    axes_of_calls,
    sample_axis,
)
from fisherscope.instrument.forwards import Around, Forward
from fisherscope.instrument.own_rows import OwnRows, bears_own_rows
from fisherscope.instrument.reference import tracked
from fisherscope.instrument.replay import is_replayable
from fisherscope.instrument.rules import find_rule
from fisherscope.instrument.small_runs import SAMPLES, SmallRuns

_SHARED = "what it returns serves all samples at once"


@dataclass(frozen=True)
class Trial:
    """What was found out.

    Attributes:
        unseen: parameter -> why its per-sample gradients cannot be seen.
        replayable: modules without a rule whose calls can be run again sample by sample, and which axes of
            their tensors run over samples.
        unruled: modules that are given more than one tensor, of which their rule would know the first only.
    """

    unseen: dict[str, str] = field(default_factory=dict)
    replayable: Mapping[nn.Module, CallAxes] = field(default_factory=dict)
    unruled: frozenset[nn.Module] = frozenset()


def try_out(
    model: nn.Module,
    modules: Mapping[str, Sequence[nn.Module]],
    every_position: Collection[nn.Module] | None = None,
) -> Trial:
    """Run small inputs of two sizes, and look at the calls of the modules that hold the parameters.

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
    watched = list(dict.fromkeys(m for owners in modules.values() for m in owners))
    try:
        runs = SmallRuns(model, watched)
    except AdapterError:
        return Trial()
    seen = _Seen(model, runs, every_position)
    mixing = {_numberless(name) for name, owners in modules.items() if not seen.mixing.isdisjoint(owners)}
    # an expert that was given as many rows as there are samples, or none, is no other than its siblings
    unseen = {
        name: "its module mixes samples with positions"
        for name in modules
        if _numberless(name) in mixing and seen.looks_at_rows(modules[name])
    }
    for name, owners in modules.items():
        if not seen.shared.isdisjoint(owners):
            unseen.setdefault(name, _SHARED)
    uncalled = [name for name, owners in modules.items() if runs.called.isdisjoint(owners)]
    unseen |= dict.fromkeys(_with_gradient(model, uncalled), "used without a call of its module")
    paths = {module: _numberless(path) for path, module in model.named_modules()}
    # an expert whose rows happen to be as many as those of samples is no other than its siblings, either
    failed = {paths[module] for module in seen.not_replayable}
    replayable = {module: axes for module, axes in seen.replayable.items() if paths[module] not in failed}
    return Trial(unseen, replayable, frozenset(seen.unruled))


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)


class _Seen:
    """What the runs tell of each watched module."""

    def __init__(
        self, model: nn.Module, runs: SmallRuns, every_position: Collection[nn.Module] | None
    ) -> None:
        self._every_position = every_position
        self.mixing: set[nn.Module] = set()
        self.in_order: set[nn.Module] = set()
        self.shared: set[nn.Module] = set()
        self.replayable: dict[nn.Module, CallAxes] = {}
        self.not_replayable: set[nn.Module] = set()
        self.unruled: set[nn.Module] = set()
        serving: list[nn.Module] = []
        for module in runs.watched:
            if module not in runs.called:
                continue
            rule = find_rule(module)
            if rule is not None and not rule.looks_up and runs.has_further_inputs(module):
                self.unruled.add(module)
                rule = None
            if rule is None:
                axes = axes_of_calls(runs.pairs(module), SAMPLES)
                if axes is None:
                    self.not_replayable.add(module)
                else:
                    self.replayable[module] = axes
            elif rule.looks_up:
                if self._look_at_lookup(module, runs):
                    serving.append(module)
            else:
                self._look_at_layer(module, runs)
        self._try_replays(runs)
        self._try_own_rows(model, runs, serving)

    def _look_at_layer(self, module: nn.Module, runs: SmallRuns) -> None:
        """Whether a layer's input has samples along its first axis."""
        for first, second in runs.pairs(module):
            if len(first) != len(second):
                self.mixing.add(module)
                continue
            for one, other in zip(first, second, strict=True):
                given = next(zip(one.inputs.values(), other.inputs.values(), strict=False), None)
                if given is not None:
                    self._look_at_input(module, *given)

    def _look_at_input(self, module: nn.Module, one: tuple[int, ...], other: tuple[int, ...]) -> None:
        rows = (one[:1], other[:1])
        if rows == ((SAMPLES[0],), (SAMPLES[1],)):
            if len(one) > 2:
                self.in_order.add(module)
            return
        flat = tuple((n * POSITIONS,) for n in SAMPLES)
        may_be_flat = self._every_position is None or module in self._every_position
        if not (may_be_flat and len(one) == 2 and rows == flat):
            self.mixing.add(module)

    def _look_at_lookup(self, module: nn.Module, runs: SmallRuns) -> bool:
        """Whether one lookup serves all samples; where ids have another form, they mix samples."""
        serves = False
        for first, second in runs.pairs(module):
            for one, other in zip(first, second, strict=False):
                given = next(zip(one.inputs.values(), other.inputs.values(), strict=False), None)
                if given is None:
                    continue
                axis = sample_axis(*given, SAMPLES)
                shape = given[0]
                if axis == 0 and len(shape) == 2 and shape[0] == SAMPLES[0]:
                    self.in_order.add(module)
                elif axis is None and (len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)):
                    serves = True
                else:
                    self.mixing.add(module)
        return serves

    def _try_replays(self, runs: SmallRuns) -> None:
        """Run the calls of modules without a rule again, sample by sample, and compare."""
        silent = [False]

        def watch(module: nn.Module) -> Around:
            def call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                output = forward(*args, **kwargs)
                if module in self.replayable and not silent[0]:
                    silent[0] = True
                    try:
                        axes = self.replayable[module]
                        if not is_replayable(module, forward, args, kwargs, output, axes, SAMPLES[0]):
                            del self.replayable[module]
                            self.not_replayable.add(module)
                    finally:
                        silent[0] = False
                return output

            return call

        if self.replayable:
            runs.again({module: watch(module) for module in list(self.replayable)})

    def _try_own_rows(self, model: nn.Module, runs: SmallRuns, serving: Sequence[nn.Module]) -> None:
        """Give every sample rows of its own where the samples share an output; not every model bears that."""
        makers: dict[nn.Module, OwnRows] = dict.fromkeys(serving, OwnRows())
        for module, axes in self.replayable.items():
            if any(axis is None for axis in axes.outputs.values()):
                makers[module] = OwnRows(axes)
        paths = {module: _numberless(path) for path, module in model.named_modules()}
        for path in dict.fromkeys(paths[module] for module in makers):
            alike = {module: maker for module, maker in makers.items() if paths[module] == path}
            if not bears_own_rows(runs, alike):
                self.shared.update(alike)
                self.not_replayable.update(self.replayable.keys() & alike.keys())

    def looks_at_rows(self, owners: Sequence[nn.Module]) -> bool:
        """Whether a layer was given rows that may be any samples' positions, or was not called at all."""
        return not self.mixing.isdisjoint(owners) or self.in_order.isdisjoint(owners)


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
