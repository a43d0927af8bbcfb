"""Watching a model's layers during one forward pass and the backward passes that follow it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

from fisherscope.errors import FisherscopeError
from fisherscope.instrument.batch_axes import floating
from fisherscope.instrument.forwards import Around, Forward, around
from fisherscope.instrument.lookup import Lookup, lookup_of, own_rows
from fisherscope.instrument.replay import Replay
from fisherscope.instrument.targets import Site, Targets
from fisherscope.instrument.uses import Use
from fisherscope.linalg import PerSampleGradient, added

Emit = Callable[[str, PerSampleGradient], None]


@dataclass(frozen=True)
class Rows:
    """How many rows a batch has.

    Attributes:
        n: samples.
        positions: of each, where both lie along one axis; a decoder has others than its encoder.
    """

    n: int
    positions: tuple[int, ...]

    def account_for(self, rows: int) -> bool:
        """Whether so many rows are those of samples, or of samples and positions."""
        return rows == self.n or any(rows == self.n * positions for positions in self.positions)


class GradientTap:
    """Turns what flows through the watched modules into per-sample gradients, one parameter at a time.

    Around a layer's forward its input and output are kept, inside of other people's hooks; a hook on the
    layer's *output tensor* receives the output gradient (full backward hooks break on models that change
    outputs in place). The rule makes per-sample gradients of them, and they are handed on at once, so that
    no more than one layer's gradients are alive. A parameter that is used several times is handed on after
    its last use, with the pieces added up before anything is squared.

    Layers whose input is cut into heads or channels (O, the down projection) are given an alias of their
    input, so that the gradient which autograd forms for it is this layer's alone.

    Attributes:
        dtypes: of what the watched layers of the last batch gave.
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
        self._uses: Counter[str] = Counter()
        self._watched: set[str] = set()
        self._unwatched: set[str] = set()
        self._called: set[str] = set()
        self._open_uses: Counter[str] = Counter()
        self._pieces: dict[str, PerSampleGradient] = {}
        self._samples = Rows(0, ())
        self._is_silent = False
        self._is_backward = False
        self._keep_graph = False
        self.dtypes: set[torch.dtype] = set()

    @contextmanager
    def attached(self, n: int, *positions: int) -> Iterator[None]:
        """Watch one batch of ``n`` samples, padded to ``positions``; a decoder's come second.

        Other people's hooks stay where they are and do what they do.
        """
        self._samples = Rows(n, positions)
        self._uses.clear()
        self._watched.clear()
        self._unwatched.clear()
        self._called.clear()
        self.dtypes.clear()
        with ExitStack() as stack:
            stack.callback(self._pieces.clear)
            for site in self._sites:
                stack.enter_context(around(site.module, self._watch(site)))
            yield

    @property
    def called(self) -> frozenset[str]:
        """Paths of the modules that the last batch called."""
        return frozenset(self._called)

    def backward(self, loss: Tensor, *, keep_graph: bool = False) -> None:
        """Hand on the gradients of one scalar; with ``keep_graph`` another may follow."""
        self._open_uses = self._uses.copy()
        self._pieces.clear()
        self._is_backward, self._keep_graph = True, keep_graph
        try:
            loss.backward(retain_graph=keep_graph)  # type: ignore[no-untyped-call]
        finally:
            self._is_backward = False
        # a use on which the loss does not depend never comes
        for name in list(self._pieces):
            self._emit(name, self._pieces.pop(name))

    def _watch(self, site: Site) -> Around:
        """What runs in place of the layer's forward: it keeps what went in and what came out."""

        def call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._is_silent:
                return forward(*args, **kwargs)
            if site.path in self._input_cut:
                args = _alias_input(args)
            output = forward(*args, **kwargs)
            replaced = self._keep(site, forward, args, kwargs, output)
            return output if replaced is None else replaced

        return call

    def _keep(
        self, site: Site, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Take notice of one call; what is returned stands in place of the output, unless it is None."""
        if not self._is_backward:
            self._uses.update(site.parameters.values())
            self._called.add(site.path)
            self.dtypes.update(tensor.dtype for tensor in floating(output))
        if not torch.is_grad_enabled():
            # the first run of a part that is checkpointed reentrantly: its uses come in the backward pass
            self._unwatched.add(site.path)
            return None
        # a checkpoint of the other kind makes again what is kept, and nothing flows through that
        is_repeated = self._is_backward and site.path in self._watched and not self._is_reentrant(site)
        if not self._is_backward:
            self._watched.add(site.path)
        if site.rule is None:
            return None if is_repeated else self._watch_call(site, forward, args, kwargs, output)
        if site.rule.looks_up:
            with self._silenced():
                found = lookup_of(site.module, forward, args, kwargs, output, self._samples.n)
            return self._watch_lookup(site, found, output, is_repeated=is_repeated)
        return self._watch_layer(site, args, kwargs, output, is_repeated=is_repeated)

    def _is_reentrant(self, site: Site) -> bool:
        """Whether a call in the backward pass comes from a part that is checkpointed reentrantly.

        Such a part is run again in the backward function of its own node, as a first use; one of the other
        kind is when a tensor is fetched that some node of torch's own has saved.
        """
        node = torch._C._current_autograd_node()
        return site.path in self._unwatched and isinstance(node, torch.autograd.function.BackwardCFunction)

    def _watch_layer(
        self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, *, is_repeated: bool
    ) -> Tensor | None:
        """Keep a call of a module with a rule, until the gradient of its output is known."""
        if not output.requires_grad:
            # with its weight frozen nothing before it asks for gradients: the graph starts here
            output = output.detach().requires_grad_()
        given = args[0] if args else next(iter(kwargs.values()))
        if sum(isinstance(value, Tensor) for value in (*args, *kwargs.values())) > 1:
            raise FisherscopeError(
                f"{site.path} is given more than one tensor, and the rule of its layer knows the first only: "
                "leave its parameters out with parameters=[...]"
            )
        # some models (OPT) flatten [n, positions, features] before a layer that sees every position
        flat = given.dim() == 2 and self._samples.account_for(given.shape[0]) and site.every_position
        if not flat and (given.shape[0] != self._samples.n or output.shape[0] != self._samples.n):
            raise FisherscopeError(
                f"{site.path} sees {given.shape[0]} rows for a batch of {self._samples.n} samples: it mixes "
                "samples with positions, so their gradients cannot be told apart; leave it out with "
                "parameters=[...]"
            )
        use = Use(given, output, flattened=self._samples.n if flat else None)
        if not is_repeated:
            if site.path in self._input_cut and args and given.requires_grad:
                on_output_gradient(output, given, use.keep_output_gradient)
                on_gradient(given, lambda gradient: self._finish(site, use, gradient))
            else:
                on_output_gradient(
                    output, given, lambda gradient: self._finish_without_input(site, use, gradient)
                )
        # what is returned may be changed in place, which a leaf of the graph does not bear
        return output.clone() if output.is_leaf else None

    def _watch_call(
        self, site: Site, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Keep a call of a module without a rule, until the gradients of all that it returned are known."""
        replay = Replay(site.module, forward, args, kwargs, site.axes, self._samples.n, self._silenced)
        output = replay.own(output)
        returned = floating(output)
        places = [k for k, tensor in enumerate(returned) if tensor.requires_grad]
        size = len(returned)  # a hook that holds the tensors it hangs on would never be freed

        def finish(gradients: Sequence[Tensor | None]) -> None:
            known: list[Tensor | None] = [None] * size
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

    def _watch_lookup(self, site: Site, found: Lookup, output: Tensor, *, is_repeated: bool) -> Tensor | None:
        """Give every sample rows of its own where one lookup served all of them."""
        rows = output
        if found.is_shared or not output.requires_grad:
            rows = own_rows(output.detach(), self._samples.n).clone().requires_grad_()
        use = Use(found.ids, output, scale=found.scale)
        if not is_repeated:
            on_gradient(rows, lambda gradient: self._finish_without_input(site, use, gradient))
        return rows.clone() if rows is not output else None

    def _finish_without_input(self, site: Site, use: Use, output_gradient: Tensor) -> None:
        use.keep_output_gradient(output_gradient)
        self._finish(site, use, None)

    def _finish(self, site: Site, use: Use, input_gradient: Tensor | None) -> None:
        assert site.rule is not None
        call = use.call(self._dtype, input_gradient)
        if not self._keep_graph:
            use.release()
        with self._silenced():
            gradients = site.rule.gradients(site.module, call, frozenset(site.parameters))
        self._hand_on(site, gradients)

    def _hand_on(self, site: Site, gradients: Mapping[str, PerSampleGradient]) -> None:
        """Hand each parameter on after its last use, with the pieces of all uses added up."""
        for local, gradient in gradients.items():
            name = site.parameters[local]
            if name in self._pieces:
                gradient = added(self._pieces.pop(name), gradient)  # noqa: PLW2901
            self._open_uses[name] -= 1
            if self._open_uses[name]:
                self._pieces[name] = gradient
            else:
                self._emit(name, gradient)


def on_gradient(tensor: Tensor, function: Callable[[Tensor], None]) -> None:
    """Call ``function`` with the gradient of ``tensor`` when the backward pass has formed it.

    It is that of the tensor as it is now, also where somebody goes on to change it in place: a hook on the
    tensor itself would be lost where only a part of it is changed.
    """
    node: Any = tensor.grad_fn
    if node is None:
        tensor.register_hook(function)  # type: ignore[no-untyped-call]
        return
    place = tensor.output_nr

    def prehook(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[place]
        if gradient is not None:
            function(gradient)

    node.register_prehook(prehook)


def on_output_gradient(output: Tensor, given: Tensor, function: Callable[[Tensor], None]) -> None:
    """The same for what a layer has made of ``given``.

    What a linear map returns is its product in another shape: a view, which autograd makes anew when
    somebody changes a part of it in place. The product itself stays.
    """
    product, shape = output._base, output.shape
    if (
        product is None
        or product.shape.numel() != shape.numel()
        or not (product.is_contiguous() and output.is_contiguous())
        or product.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    ):
        on_gradient(output, function)
    else:
        on_gradient(product, lambda gradient: function(gradient.reshape(shape)))


def _alias_input(args: tuple[Any, ...]) -> tuple[Any, ...]:
    if not args or not isinstance(args[0], Tensor):
        return args
    return (args[0].view_as(args[0]), *args[1:])
