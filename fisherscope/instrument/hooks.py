"""Watching a model's layers during one forward and backward pass, and leaving it as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils import _pytree as pytree

from fisherscope.adapters.injected import plain_layer
from fisherscope.adapters.unwrap import uncompiled
from fisherscope.errors import FisherscopeError
from fisherscope.instrument.lookup import Lookup, lookup_of
from fisherscope.instrument.replay import Replay, Samples, floating
from fisherscope.instrument.rules import LayerCall
from fisherscope.instrument.targets import Site, Targets
from fisherscope.linalg import Factored, PerSampleGradient, Rows, Total

Emit = Callable[[str, PerSampleGradient], None]


class GradientTap:
    """Turns what flows through the watched modules into per-sample gradients, one parameter at a time.

    A forward hook keeps a layer's input and output; a hook on the layer's *output tensor* receives the
    output gradient (full backward hooks break on models that change outputs in place). The rule makes
    per-sample gradients of them, and they are handed on at once, so that no more than one layer's gradients
    are alive. A parameter that is used several times is handed on after its last use, with the pieces added
    up before anything is squared.

    Layers whose input is cut into heads or channels (O, the down projection) are given an alias of their
    input, so that the gradient which autograd forms for it is this layer's alone.
    """

    def __init__(
        self, targets: Targets, emit: Emit, compute_dtype: torch.dtype, *, input_cut: Collection[str] = ()
    ) -> None:
        """Watch the sites of ``targets``.

        Args:
            targets: what to watch.
            emit: called with ``(parameter, gradient)`` when a gradient is complete.
            compute_dtype: dtype that the rules get.
            input_cut: paths of sites whose input gradient spares a product.
        """
        self._sites = targets.sites
        self._emit = emit
        self._dtype = compute_dtype
        self._input_cut = frozenset(input_cut)
        self._open_uses: Counter[str] = Counter()
        self._pieces: dict[str, PerSampleGradient] = {}
        self._n = 0
        self._positions = 0
        self._is_silent = False

    @contextmanager
    def attached(self, n: int, positions: int) -> Iterator[None]:
        """Hooks for one batch of ``n`` samples, padded to ``positions``.

        Only hooks of our own are removed afterwards.
        """
        self._n, self._positions = n, positions
        self._open_uses.clear()
        self._pieces.clear()
        with ExitStack() as stack:
            for site in self._sites:
                if site.path in self._input_cut:
                    handle = site.module.register_forward_pre_hook(_alias_input)
                    stack.callback(handle.remove)
                handle = site.module.register_forward_hook(self._forward_hook(site), with_kwargs=True)
                stack.callback(handle.remove)
            stack.callback(self._pieces.clear)
            yield

    def _forward_hook(self, site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._is_silent or not torch.is_grad_enabled():
                return None
            if site.rule is None:
                return self._watch_call(site, args, kwargs, output)
            if site.rule.looks_up:
                return self._watch_lookup(site, lookup_of(module, args, kwargs, output, self._n), output)
            if not output.requires_grad:
                # with its weight frozen nothing before it asks for gradients: the graph starts here
                output = output.detach().requires_grad_()
            given = args[0] if args else next(iter(kwargs.values()))
            # some models (OPT) flatten [n, positions, features] before a layer that sees every position
            flat = given.dim() == 2 and given.shape[0] == self._n * self._positions and site.every_position
            if not flat and (given.shape[0] != self._n or output.shape[0] != self._n):
                raise FisherscopeError(
                    f"{site.path} sees {given.shape[0]} rows for a batch of {self._n} samples: it mixes "
                    "samples with positions, so their gradients cannot be told apart; leave it out with "
                    "parameters=[...]"
                )
            self._open_uses.update(site.parameters.values())
            use = _Use(given.detach(), output.detach(), output._version, self._n if flat else None)
            if site.path in self._input_cut and args and given.requires_grad:
                on_gradient(output, use.keep_output_gradient)
                on_gradient(given, lambda gradient: self._finish(site, use, gradient))
            else:
                on_gradient(output, lambda gradient: self._finish_without_input(site, use, gradient))
            # what is returned may be changed in place, which a leaf of the graph does not bear
            return output.clone() if output.is_leaf else None

        return hook

    def _watch_call(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Keep a call of a module without a rule, until the gradients of all that it returned are known."""
        if isinstance(output, Tensor) and not output.requires_grad:
            output = output.detach().requires_grad_()
        # copies: one output may depend on another within the module, and what counts comes from outside;
        # views would not do where the model goes on to change what it was given in place
        output = pytree.tree_map_only(Tensor, lambda t: t.clone() if t.requires_grad else t, output)
        samples = Samples(self._n, self._positions)
        replay = Replay(site.module, args, kwargs, samples, self._silenced)
        returned = floating(output)
        places = [k for k, tensor in enumerate(returned) if tensor.requires_grad]
        self._open_uses.update(site.parameters.values())

        def finish(gradients: Sequence[Tensor | None]) -> None:
            known: list[Tensor | None] = [None] * len(returned)
            for place, gradient in zip(places, gradients, strict=True):
                known[place] = gradient
            self._hand_on(site, replay.gradients(known, frozenset(site.parameters)))

        register_multi_grad_hook([returned[place] for place in places], finish)
        return output

    @contextmanager
    def _silenced(self) -> Iterator[None]:
        before, self._is_silent = self._is_silent, True
        try:
            yield
        finally:
            self._is_silent = before

    def _watch_lookup(self, site: Site, found: Lookup, output: Tensor) -> Tensor | None:
        """Give every sample rows of its own where one lookup served all of them."""
        rows = output
        if found.is_shared or not output.requires_grad:
            own = output.detach().reshape(-1, *output.shape[-2:]).expand(self._n, -1, -1)
            rows = own.clone().requires_grad_()
        self._open_uses.update(site.parameters.values())
        use = _Use(found.ids, output.detach(), output._version, None, scale=found.scale)
        on_gradient(rows, lambda gradient: self._finish_without_input(site, use, gradient))
        return rows.clone() if rows is not output else None

    def _finish_without_input(self, site: Site, use: _Use, output_gradient: Tensor) -> None:
        use.keep_output_gradient(output_gradient)
        self._finish(site, use, None)

    def _finish(self, site: Site, use: _Use, input_gradient: Tensor | None) -> None:
        assert site.rule is not None
        call = use.call(self._dtype, input_gradient)
        self._hand_on(site, site.rule.gradients(site.module, call, frozenset(site.parameters)))

    def _hand_on(self, site: Site, gradients: Mapping[str, PerSampleGradient]) -> None:
        """Hand each parameter on after its last use, with the pieces of all uses added up."""
        for local, gradient in gradients.items():
            name = site.parameters[local]
            if name in self._pieces:
                gradient = _sum_of_uses(self._pieces.pop(name), gradient)  # noqa: PLW2901
            self._open_uses[name] -= 1
            if self._open_uses[name]:
                self._pieces[name] = gradient
            else:
                self._emit(name, gradient)


class _Use:
    """One call of one watched layer, between its forward and its backward pass.

    Tensors of ``flattened`` samples are unfolded to ``[n, positions, features]`` for the rule.
    """

    def __init__(
        self, inputs: Tensor, outputs: Tensor, version: int, flattened: int | None, scale: float = 1.0
    ) -> None:
        self._scale = scale
        self._inputs = inputs
        self._outputs = outputs
        self._version = version
        self._flattened = flattened
        self._output_gradient: Tensor | None = None

    def keep_output_gradient(self, gradient: Tensor) -> None:
        """Wait for the gradient of the input."""
        self._output_gradient = gradient.detach()

    def call(self, dtype: torch.dtype, input_gradient: Tensor | None) -> LayerCall:
        """What the rule gets; images that are rounded, or were changed in place since, are left out."""
        if self._output_gradient is None:
            raise RuntimeError("the gradient of a layer's input came before that of its output")
        intact = self._outputs.dtype == dtype and self._outputs._version == self._version
        exact = input_gradient is not None and input_gradient.dtype == dtype
        return LayerCall(
            inputs=self._by_sample(
                self._inputs.to(dtype) if self._inputs.is_floating_point() else self._inputs
            ),
            output_gradient=self._by_sample(self._output_gradient.to(dtype) * self._scale),
            outputs=self._by_sample(self._outputs) if intact else None,
            input_gradient=self._by_sample(input_gradient.detach())
            if exact and input_gradient is not None
            else None,
        )

    def _by_sample(self, tensor: Tensor) -> Tensor:
        return tensor if self._flattened is None else torch.unflatten(tensor, 0, (self._flattened, -1))


def on_gradient(tensor: Tensor, function: Callable[[Tensor], None]) -> None:
    """Call ``function`` with the gradient of ``tensor`` when the backward pass has formed it."""
    tensor.register_hook(function)  # type: ignore[no-untyped-call]


def _alias_input(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not args or not isinstance(args[0], Tensor):
        return None
    return (args[0].view_as(args[0]), *args[1:])


def _sum_of_uses(first: PerSampleGradient, second: PerSampleGradient) -> PerSampleGradient:
    if isinstance(first, Factored) and isinstance(second, Factored):
        return first.concatenated(second)
    if isinstance(first, Rows) and isinstance(second, Rows):
        return first.joined(second)
    return Total(first, second)


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

    handles = [module.register_forward_hook(start_graph) for module in _token_embeddings(model)]
    try:
        model.eval()
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        with uncompiled(model), torch.inference_mode(mode=False), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)


def _token_embeddings(model: nn.Module) -> list[nn.Module]:
    """The embedding of the input, and others with its weight: T5's encoder and decoder have one each."""
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    shared = getattr(plain_layer(embeddings), "weight", None)
    same = (m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is shared)
    return list(dict.fromkeys([embeddings, *same]))
