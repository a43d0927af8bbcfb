"""Per-sample gradients of a module without a rule: its call is run again for each sample, with autograd.

That is exact for any module that treats samples independently, such as a router, a mixture of experts with
stacked weights, an embedding with a class token, or a layer of the user's own. It costs the module's own
forward and backward pass once more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from typing_extensions import override

from fisherscope.adapters.derived import computing_hooks
from fisherscope.adapters.kinds import is_a
from fisherscope.errors import FisherscopeError
from fisherscope.instrument.batch_axes import (
    CallAxes,
    all_agree,
    can_have_own_rows,
    floating,
    of_sample,
    placed_tensors,
)
from fisherscope.linalg import Dense, OneByOne, PerSampleGradient

_MOST_BYTES = 256 << 20  # of gradients that are held together
_MOST_UNKNOWN = 4  # tensors of a call of which it is not known whether samples share them


class Replay:
    """One call of a module, to be run again sample by sample."""

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        axes: CallAxes,
        n: int,
        silence: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Keep what went in.

        Args:
            module: the module; its submodules are run again, too.
            forward: its own forward, without the hooks of the module: what they change comes after it.
            args, kwargs: of the call.
            axes: which axes of its tensors run over samples, as far as is known.
            n: number of samples.
            silence: a context in which nobody takes notice of calls.
        """
        self._module = module
        self._bare = _Bare(module, forward)
        self._given = pytree.tree_map_only(Tensor, torch.Tensor.detach, without_caches(args, kwargs))
        self._known = axes
        self._n = n
        self._silence = silence
        self._input_axes: list[int | None] = []
        self._output_axes: list[int | None] = []
        self._expected: dict[int, list[Tensor]] = {}

    def own(self, output: Any) -> Any:
        """What the call returned, as copies that ask for gradients, in which every sample has its rows.

        One output may depend on another within the module, and what counts comes from outside; with its
        weight frozen, a table's output asks for no gradient by itself.

        Raises:
            FisherscopeError: a sample run alone gives something else than in the batch.
        """
        self._settle_axes(output)
        axes = iter(self._output_axes)

        def separate(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            if next(axes) is None and self._n > 1:
                tensor = tensor.expand(self._n, *tensor.shape[1:])
            copy = tensor.clone()
            return copy if copy.requires_grad else copy.requires_grad_()

        owned = pytree.tree_map_only(Tensor, separate, output)
        self._output_axes = [0 if axis is None else axis for axis in self._output_axes]
        return owned

    def _settle_axes(self, output: Any) -> None:
        """Find the axes over samples of tensors that were not seen before: those that give what it gave.

        The mask of a padded batch is such a tensor, where models leave it out without padding.
        """
        given = placed_tensors(self._given)
        returned = [(place, t.detach()) for place, t in placed_tensors(output) if t.is_floating_point()]
        choices = [
            *(self._choices(place, tensor, self._known.inputs) for place, tensor in given),
            *(self._choices(place, tensor, self._known.outputs) for place, tensor in returned),
        ]
        is_settled = all(len(choice) == 1 for choice in choices)
        if sum(len(choice) > 1 for choice in choices) > _MOST_UNKNOWN:
            choices = [choice[:1] for choice in choices]
        for axes in itertools.product(*choices):
            self._input_axes, self._output_axes = list(axes[: len(given)]), list(axes[len(given) :])
            values = list(zip((tensor for _, tensor in returned), self._output_axes, strict=True))
            if not all(axis is not None or self._n == 1 or can_have_own_rows(t) for t, axis in values):
                continue
            self._expected = {
                i: [of_sample(tensor, axis, i, self._n).clone() for tensor, axis in values]
                for i in {0, self._n - 1}
            }
            if is_settled or self._gives_what_is_expected():
                return
        raise self._refusal()

    def _choices(self, place: str, tensor: Tensor, known: Mapping[str, int | None]) -> list[int | None]:
        axis = known.get(place)
        if axis is not None and axis < tensor.dim() and tensor.shape[axis] % self._n == 0:
            return [axis]
        # what was shared in a trial may be given for each sample now, as positions are
        divides = self._n > 1 and tensor.dim() > 0 and tensor.shape[0] % self._n == 0
        return [0, None] if divides else [None]

    def _gives_what_is_expected(self) -> bool:
        try:
            with torch.no_grad():
                for i in self._expected:
                    self.outputs(i, {})
        except Exception:  # what it is given has the wrong size, or it gives something else
            return False
        return True

    def outputs(self, i: int, parameters: dict[str, Tensor]) -> list[Tensor]:
        """Tensors of floating point that the call returns for sample i.

        Raises:
            FisherscopeError: they are not what the batch got.
        """
        axes = iter(self._input_axes)
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda tensor: of_sample(tensor, next(axes), i, self._n), self._given
        )
        named = {f"module.{name}": value for name, value in parameters.items()}
        with self._silence():
            found = floating(functional_call(self._bare, named, args, kwargs))
        if i in self._expected and not all_agree(found, self._expected[i]):
            raise self._refusal()
        return found

    def _refusal(self) -> FisherscopeError:
        return FisherscopeError(
            f"a call of {type(self._module).__name__} gives a sample something else in the batch than alone: "
            "samples influence each other there, or it depends on something beside its arguments, such as a "
            "hook that keeps values of the whole batch. Leave its parameters out with parameters=[...]"
        )

    def gradients(
        self, output_gradients: Sequence[Tensor | None], wanted: frozenset[str]
    ) -> dict[str, PerSampleGradient]:
        """Per-sample gradients of parameters of the module, or of modules inside of it.

        Args:
            output_gradients: of the tensors that the call returned; None where nothing depends on one.
            wanted: names of the parameters, from the module on.

        Raises:
            FisherscopeError: a sample run alone gives something else than in the batch.
        """
        every = self._module.named_parameters(remove_duplicate=False)
        own = {name: parameter for name, parameter in every if name in wanted}
        n = self._n
        if 4 * n * sum(p.numel() for p in own.values()) <= _MOST_BYTES:
            each = [self._of_sample(i, own, output_gradients) for i in range(n)]
            return {name: Dense(torch.stack([g[name] for g in each]).float()) for name in own}

        def former(name: str) -> Callable[[int], Tensor]:
            return lambda i: self._of_sample(i, {name: own[name]}, output_gradients)[name].float()

        return {name: OneByOne(former(name), n, tuple(p.shape), p.device) for name, p in own.items()}

    def _of_sample(
        self, i: int, own: dict[str, nn.Parameter], output_gradients: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        parameters = {name: p.detach().requires_grad_() for name, p in own.items()}
        with torch.enable_grad():
            outputs = self.outputs(i, dict(parameters))
        known = [
            (output, of_sample(gradient, axis, i, self._n))
            for output, gradient, axis in zip(outputs, output_gradients, self._output_axes, strict=True)
            if gradient is not None and output.requires_grad
        ]
        if not known:
            return {name: torch.zeros_like(p) for name, p in own.items()}
        found = torch.autograd.grad(
            [output for output, _ in known],
            list(parameters.values()),
            [gradient.to(output.dtype) for output, gradient in known],
            allow_unused=True,
        )
        return {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(parameters.items(), found, strict=True)
        }


class _Bare(nn.Module):
    """A module without its own hooks; those of the modules inside of it stay.

    Hooks that compute a tensor of the module from its parameters are part of what it computes, and are run.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self._forward = forward

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        computing = computing_hooks(self.module)
        kept = {name: vars(self.module)[name] for name in computing}
        try:
            for hook in computing.values():
                hook(self.module, args)
            return self._forward(*args, **kwargs)
        finally:
            vars(self.module).update(kept)


def without_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call less its caches: one holds what the call itself has put there.

    Without it a sample is run from its beginning.
    """
    return tuple(without_cache(value) for value in args), {k: without_cache(v) for k, v in kwargs.items()}


def without_cache(value: Any) -> Any:
    """None for a cache of keys and values, anything else as it came."""
    return None if is_a(value, "transformers", "Cache") else value


def is_replayable(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    axes: CallAxes,
    n: int,
) -> bool:
    """Whether a call gives each sample the same when it is run for that sample alone."""
    if not floating(output):
        return False
    replay = Replay(module, forward, args, kwargs, axes, n, nullcontext)
    try:
        with torch.no_grad():
            replay.own(pytree.tree_map_only(Tensor, torch.Tensor.detach, output))
            for i in range(n):
                replay.outputs(i, {})
    except Exception:  # whatever it wants, it does not run on one sample as it does on several
        return False
    return True
