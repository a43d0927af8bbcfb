"""Watching a model's layers during one forward and backward pass, and leaving it as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fisherscope.errors import FisherscopeError
from fisherscope.instrument.targets import Site, Targets
from fisherscope.linalg import Dense, Factored, PerSampleGradient

Emit = Callable[[str, PerSampleGradient], None]


class GradientTap:
    """Turns what flows through the watched modules into per-sample gradients, one parameter at a time.

    A forward hook keeps a layer's input; a hook on the layer's *output tensor* receives the output
    gradient (full backward hooks break on models that change outputs in place). The rule makes a
    per-sample gradient of the two, and it is handed on at once, so that no more than one layer's
    gradients are alive. A parameter that is used several times is handed on after its last use, with the
    pieces added up before anything is squared.
    """

    def __init__(self, targets: Targets, emit: Emit, compute_dtype: torch.dtype) -> None:
        """Watch the sites of ``targets`` and give each finished gradient to ``emit(parameter, gradient)``."""
        self._sites = targets.sites
        self._emit = emit
        self._dtype = compute_dtype
        self._open_uses: Counter[str] = Counter()
        self._pieces: dict[str, PerSampleGradient] = {}
        self._n = 0

    @contextmanager
    def attached(self, n: int) -> Iterator[None]:
        """Hooks for one batch of ``n`` samples; only hooks of our own are removed afterwards."""
        self._n = n
        self._open_uses.clear()
        self._pieces.clear()
        handles = [
            site.module.register_forward_hook(self._forward_hook(site), with_kwargs=True)
            for site in self._sites
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._pieces.clear()

    def _forward_hook(self, site: Site) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if not (torch.is_grad_enabled() and output.requires_grad):
                return
            inputs = (args[0] if args else next(iter(kwargs.values()))).detach()
            if inputs.shape[0] != self._n or output.shape[0] != self._n:
                raise FisherscopeError(
                    f"{site.path} sees {inputs.shape[0]} rows for a batch of {self._n} samples: it mixes "
                    "samples with positions, so their gradients cannot be told apart; leave it out with "
                    "parameters=[...]"
                )
            self._open_uses.update(site.parameters.values())
            output.register_hook(lambda gradient: self._backward(site, inputs, gradient))  # type: ignore[no-untyped-call]

        return hook

    def _backward(self, site: Site, inputs: Tensor, output_gradient: Tensor) -> None:
        gradients = site.rule.gradients(
            site.module,
            inputs.to(self._dtype),
            output_gradient.detach().to(self._dtype),
            frozenset(site.parameters),
        )
        for local, gradient in gradients.items():
            name = site.parameters[local]
            if name in self._pieces:
                gradient = _sum_of_uses(self._pieces.pop(name), gradient)  # noqa: PLW2901
            self._open_uses[name] -= 1
            if self._open_uses[name]:
                self._pieces[name] = gradient
            else:
                self._emit(name, gradient)


def _sum_of_uses(first: PerSampleGradient, second: PerSampleGradient) -> PerSampleGradient:
    if isinstance(first, Factored) and isinstance(second, Factored):
        return first.concatenated(second)
    return Dense(first.dense() + second.dense())


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, frozen parameters and a graph that starts at the embedding output.

    Frozen parameters keep autograd from forming the weight-gradient products which the rules form anyway,
    and from touching ``.grad``. Modes and ``requires_grad`` are restored on any exit.
    """
    modes = [(module, module.training) for module in model.modules()]
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def start_graph(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()
        return output

    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(start_graph)
    try:
        model.eval()
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)
