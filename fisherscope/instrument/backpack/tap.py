"""Hooks that bring BackPACK's active extensions the per-sample gradients of a whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from backpack import disable
from backpack.context import CTX
from backpack.extensions.backprop_extension import BackpropExtension
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fisherscope.errors import CoverageError, FisherscopeError
from fisherscope.instrument.backpack.active import active_extensions
from fisherscope.instrument.backpack.batch_size import batch_size
from fisherscope.instrument.backpack.calls import Call, graph_task
from fisherscope.instrument.backpack.check import SumCheck
from fisherscope.instrument.backpack.module_extension import save_quantity
from fisherscope.instrument.backpack.owners import given_every_position, owners_of, unseen
from fisherscope.instrument.backpack.pieces import Pieces
from fisherscope.instrument.backpack.quantities import quantity_of
from fisherscope.instrument.batch_axes import floating
from fisherscope.instrument.hooks import on_gradient
from fisherscope.instrument.lookup import lookup_of
from fisherscope.instrument.rules import find_rule

MARK = "_backpack_extend"  # BackPACK's own: what bears it is not extended again
_FREEZE = (
    "freeze it with requires_grad_(False) to leave it out, or register a rule for its layer with "
    "fisherscope.register_rule"
)


class BackpackTap:
    """Watches a model from now on, as BackPACK's ``extend`` does, until it is removed.

    A call's per-sample gradients come from a hook on its *output tensor* (BackPACK's full backward hooks
    break on models that change outputs in place). A hook on each parameter tells when autograd has its whole
    gradient: then all calls have come, their pieces are added up, and BackPACK saves its quantities.
    """

    def __init__(self, model: nn.Module) -> None:
        """Hook the model and every module that holds a parameter."""
        self._model = model
        self._owners = owners_of(model)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._ordered = given_every_position(model)
        self._unseen = unseen(model, self._owners, self._names)
        self._pieces = Pieces()
        self._check = SumCheck()
        self._n: int | None = None
        self._is_running = False
        self._forward_pass = 0
        self._calls: dict[nn.Module, int] = {}
        self._unruled: set[nn.Parameter] = set()
        self._missing: dict[nn.Module, set[nn.Parameter]] = {}
        self._savefields: set[str] = set()
        self._watched = {owner.module: owner.path for own in self._owners.values() for owner in own}
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        self._parameter_handles: list[Any] = []
        for module, path in self._watched.items():
            hook = partial(self._after_call, path)
            # before other people's, which may change what the module returns
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
            setattr(module, MARK, True)

    def remove(self) -> None:
        """Take the hooks away, and what was saved on parameters."""
        for handle in [*self._handles, *self._parameter_handles]:
            handle.remove()
        for module in self._watched:
            delattr(module, MARK)
        for parameter in self._owners:
            for savefield in self._savefields & vars(parameter).keys():
                delattr(parameter, savefield)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _is_recording():
            return
        self._forward_pass += 1
        self._is_running = True
        self._n = batch_size(model, args, kwargs)
        self._calls.clear()
        self._unruled.clear()
        self._missing.clear()
        self._pieces.clear()
        for handle in self._parameter_handles:
            handle.remove()
        self._parameter_handles.clear()
        for parameter in self._owners:
            if parameter.requires_grad:
                hook = partial(self._complete, parameter)
                self._parameter_handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]

    def _end(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        self._is_running = False

    def _samples(self) -> int | None:
        """Number of samples; None for a layer that is called neither by the model nor by a checkpoint."""
        return self._n if self._is_running or graph_task() >= 0 else None

    def _after_call(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not _is_recording() or not any(p.requires_grad for p in module.parameters(recurse=False)):
            return None
        returned = next((t for t in floating(output) if t.requires_grad), None)
        if returned is None:
            return None
        if graph_task() < 0:
            self._calls[module] = self._calls.get(module, 0) + 1
        rule = find_rule(module)
        if rule is not None and rule.looks_up:
            return self._after_lookup(path, module, args, kwargs, returned)
        given = _tensors(args, kwargs)
        samples, fault = None, ""
        if rule is not None:
            samples, fault = self._samples_of(path, module, given[0] if given else None)
        call = Call(
            module,
            path,
            given,
            returned,
            forward_pass=self._forward_pass,
            samples=samples,
            fault=fault,
        )
        on_gradient(returned, partial(self._arrived, call))
        return None

    def _after_lookup(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Give every sample rows of its own where one lookup served all of them."""
        n, found, fault, rows = self._samples(), None, "", output
        if n is None:
            fault = self._not_begun(path)
        else:
            try:
                found = lookup_of(module, module.forward, args, kwargs, output, n)
            except FisherscopeError as error:
                fault = f"{path}: {error}; {_FREEZE}"
        if found is not None and found.is_shared and n is not None:
            rows = output.reshape(-1, *output.shape[-2:]).expand(n, -1, -1).clone()
        call = Call(
            module,
            path,
            _tensors(args, kwargs),
            rows,
            forward_pass=self._forward_pass,
            lookup=found,
            fault=fault,
        )
        on_gradient(rows, partial(self._arrived, call))
        return rows if rows is not output else None

    def _samples_of(self, path: str, module: nn.Module, given: Tensor | None) -> tuple[int | None, str]:
        """The number of samples, if they lie along one axis with the positions; and what is wrong."""
        if (n := self._samples()) is None:
            return None, self._not_begun(path)
        if given is None or given.dim() == 0:
            return None, f"{path} is given no tensor of features; {_FREEZE}"
        rows = given.shape[0]
        if rows == n:
            return None, ""
        names = {self._names.get(parameter, "") for parameter in module.parameters(recurse=False)}
        if given.dim() == 2 and rows % n == 0 and names & self._ordered:
            return n, ""
        return None, (
            f"{path} sees {rows} rows for a batch of {n} samples: it mixes samples with positions, so "
            f"their gradients cannot be told apart; {_FREEZE}"
        )

    def _not_begun(self, path: str) -> str:
        return (
            f"{path} was called outside of the model that was made ready, so the number of samples is not "
            f"known: call the {type(self._model).__name__} that extend() was given, or extend the part that "
            "you call"
        )

    def _arrived(self, call: Call, gradient: Tensor) -> None:
        """The gradient of a call's output is there."""
        active = active_extensions()
        if not active:
            return
        if call.forward_pass != self._forward_pass:
            raise FisherscopeError(
                "the model has run again between a forward pass and its backward pass: call backward() "
                "first, and wrap runs that are for something else in torch.no_grad()"
            )
        own = _not_frozen(call.module)
        self._missing.setdefault(call.module, set(own.values()))
        rule = find_rule(call.module)
        ruled = [name for name in own if rule is not None and name in rule.handles]
        self._unruled.update(parameter for name, parameter in own.items() if name not in ruled)
        quantities = [extension for extension in active if quantity_of(extension) is not None]
        if quantities:
            self._refuse(own, ruled)
        inputs = call.inputs()
        with torch.no_grad():
            if rule is not None and ruled and quantities:
                seen = call.for_rule(inputs, gradient)
                for name, piece in rule.gradients(call.module, seen, frozenset(ruled)).items():
                    self._pieces.add(own[name], piece, is_repeated=call.is_repeated)
            for extension in active:
                if not (ruled and extension in quantities):
                    self._run_as_backpack_does(extension, call, inputs, gradient, own)

    def _refuse(self, own: Mapping[str, nn.Parameter], ruled: Sequence[str]) -> None:
        """Refuse parameters of a called module whose per-sample gradients would be wrong or incomplete."""
        for name, parameter in own.items():
            full = self._names[parameter]
            if full in self._unseen:
                raise CoverageError(f"{full}: {self._unseen[full]}; {_FREEZE}")
            if ruled and name not in ruled:
                raise CoverageError(f"the rule of its layer does not know {full}; {_FREEZE}")

    def _run_as_backpack_does(
        self,
        extension: BackpropExtension,
        call: Call,
        inputs: list[Tensor],
        gradient: Tensor,
        own: dict[str, nn.Parameter],
    ) -> None:
        """Run an extension's own module extension, or have BackPACK say in its way that there is none."""
        before = {name: getattr(parameter, extension.savefield, None) for name, parameter in own.items()}
        call.for_backpack(inputs, gradient, extension)
        for name, parameter in own.items():
            is_new = getattr(parameter, extension.savefield, None) is not before[name]
            if is_new:
                self._savefields.add(extension.savefield)
            if is_new and (self._calls.get(call.module, 1) > 1 or len(self._owners[parameter]) > 1):
                raise FisherscopeError(
                    f"{self._names[parameter]} is used several times in a forward pass, and "
                    f"{type(extension).__name__} sees one call at a time, so that its results for them "
                    f"cannot be put together; {_FREEZE}"
                )

    def _complete(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Autograd has the whole gradient of a parameter, so all calls that use it have come."""
        active = active_extensions()
        if not active:
            return
        name = self._names[parameter]
        quantities = [extension for extension in active if quantity_of(extension) is not None]
        gradient = self._pieces.take(parameter, name)
        if gradient is None:
            if parameter not in self._unruled and (quantities or not self._was_called(parameter)):
                raise CoverageError(
                    f"{name} has a gradient, but none of its layers was called: its per-sample gradients "
                    f"cannot be seen; {_FREEZE}"
                )
        elif parameter in self._unruled:
            raise CoverageError(
                f"{name} is used by several modules, and there is a rule for some of them only: register one "
                "for the others with fisherscope.register_rule"
            )
        else:
            with torch.no_grad():
                self._check(name, gradient, whole)
                owner = next(o for o in self._owners[parameter] if o.rule is not None)
                for extension in quantities:
                    save_quantity(extension, owner.module, {owner.local: gradient})
                    self._savefields.add(extension.savefield)
        self._run_hook(parameter)

    def _was_called(self, parameter: nn.Parameter) -> bool:
        return any(owner.module in self._calls for owner in self._owners[parameter])

    def _run_hook(self, parameter: nn.Parameter) -> None:
        """BackPACK's ``extension_hook`` is called with a module when all of its parameters are complete."""
        for owner in self._owners[parameter]:
            missing = self._missing.get(owner.module)
            if missing is None:
                continue
            missing.discard(parameter)
            if not missing:
                del self._missing[owner.module]
                CTX.get_extension_hook()(owner.module)


def _is_recording() -> bool:
    return torch.is_grad_enabled() and disable.should_store_io()


def _not_frozen(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
