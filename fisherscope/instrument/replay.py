"""Per-sample gradients of a module without a rule: its call is run again for each sample, with autograd.

That is exact for any module that treats samples independently, such as a router, a mixture of experts with
stacked weights, an embedding with a class token, or a layer of the user's own. It costs the module's own
forward and backward pass once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fisherscope.adapters.kinds import is_a
from fisherscope.linalg import Dense, OneByOne, PerSampleGradient

_MOST_BYTES = 256 << 20  # of gradients that are held together


@dataclass(frozen=True)
class Samples:
    """How tensors of a batch are divided among its samples.

    Attributes:
        n: samples.
        positions: of each, where both lie along one axis; a decoder has others than its encoder.
    """

    n: int
    positions: tuple[int, ...]

    def account_for(self, rows: int) -> bool:
        """Whether so many rows are those of samples, or of samples and positions."""
        return rows == self.n or any(rows == self.n * positions for positions in self.positions)

    def fits(self, tensor: Tensor) -> bool:
        """Whether the first axis is that of samples, or of samples and positions."""
        return tensor.dim() > 0 and self.account_for(tensor.shape[0])

    def are_served_at_once(self, tensor: Tensor) -> bool:
        """Whether all samples share what would broadcast over them, such as T5's position biases."""
        return tensor.dim() > 2 and tensor.shape[0] == 1 < self.n

    def own(self, tensor: Tensor) -> Tensor:
        """A copy that asks for a gradient, in which every sample has rows of its own.

        With its weight frozen, a table's output asks for none by itself.
        """
        if not tensor.is_floating_point():
            return tensor
        if self.are_served_at_once(tensor):
            tensor = tensor.expand(self.n, *tensor.shape[1:])
        copy = tensor.clone()
        return copy if copy.requires_grad else copy.requires_grad_()

    def take(self, tensor: Tensor, i: int) -> Tensor:
        """Rows of sample i; all of a tensor that all samples share."""
        if not self.fits(tensor):
            return tensor
        share = tensor.shape[0] // self.n
        return tensor[i * share : (i + 1) * share]


class Replay:
    """One call of a module, to be run again sample by sample."""

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        samples: Samples,
        silence: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Keep what went in.

        Args:
            module: the module; its submodules are run again, too.
            args, kwargs: of the call.
            samples: how its tensors are divided.
            silence: a context in which hooks take no notice of calls.
        """
        self._module = module
        # a cache holds what the call itself has put there: without it a sample is run from its beginning
        positional = tuple(without_cache(value) for value in args)
        plain = positional, {k: without_cache(v) for k, v in kwargs.items()}
        self._given = pytree.tree_map_only(Tensor, torch.Tensor.detach, plain)
        self._samples = samples
        self._silence = silence

    def outputs(self, i: int, parameters: dict[str, Tensor]) -> list[Tensor]:
        """Tensors of floating point that the call returns for sample i."""
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: self._samples.take(t, i), self._given)
        with self._silence():
            return floating(functional_call(self._module, parameters, args, kwargs))

    def gradients(
        self, output_gradients: Sequence[Tensor | None], wanted: frozenset[str]
    ) -> dict[str, PerSampleGradient]:
        """Per-sample gradients of parameters of the module, or of modules inside of it.

        Args:
            output_gradients: of the tensors that the call returned; None where nothing depends on one.
            wanted: names of the parameters, from the module on.
        """
        every = self._module.named_parameters(remove_duplicate=False)
        own = {name: parameter for name, parameter in every if name in wanted}
        n = self._samples.n
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
        pairs = zip(outputs, output_gradients, strict=True)
        known = [(o, self._samples.take(g, i)) for o, g in pairs if g is not None and o.requires_grad]
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


def without_cache(value: Any) -> Any:
    """None for a cache of keys and values, anything else as it came."""
    return None if is_a(value, "transformers", "Cache") else value


def floating(output: Any) -> list[Tensor]:
    """The tensors of floating point in what a module returns, in order."""
    return [
        leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def is_replayable(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, samples: Samples
) -> bool:
    """Whether a call gives each sample the same when it is run for that sample alone."""
    returned = floating(output)
    if not returned or not all(samples.fits(t) or samples.are_served_at_once(t) for t in returned):
        return False
    replay = Replay(module, args, kwargs, samples, nullcontext)
    try:
        with torch.no_grad():
            alone = replay.outputs(samples.n - 1, {})
    except Exception:  # whatever it wants, it does not run on one sample
        return False
    return len(alone) == len(returned) and all(
        a.shape == (mine := samples.take(whole.detach(), samples.n - 1)).shape
        and torch.allclose(a.float(), mine.float(), rtol=1e-3, atol=1e-3 * float(mine.abs().max()))
        for a, whole in zip(alone, returned, strict=True)
    )
