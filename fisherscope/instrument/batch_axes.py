"""Which axis of each tensor of a call runs over the samples: found by calling with two numbers of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fisherscope.errors import FisherscopeError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class CallAxes:
    """The axes over samples of the tensors of a module's calls, by where they stand.

    A tensor that is not named was not seen; one whose axis is None is shared by all samples.

    Attributes:
        inputs: of the tensors among positional and named arguments.
        outputs: of the tensors among what it returned.
    """

    inputs: Mapping[str, int | None] = field(default_factory=dict)
    outputs: Mapping[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class CallShapes:
    """The shapes of all tensors of one call of a module, by where they stand."""

    inputs: Shapes
    outputs: Shapes

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> CallShapes:
        """Those of the arguments and of what came back."""
        return cls(_shapes((args, kwargs)), _shapes(output))


def _shapes(values: Any) -> Shapes:
    return {place: tuple(tensor.shape) for place, tensor in placed_tensors(values)}


def placed_tensors(values: Any) -> list[tuple[str, Tensor]]:
    """The tensors in arguments or outputs, in order, each with where it stands."""
    leaves, _ = pytree.tree_flatten_with_path(values)
    return [(pytree.keystr(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]


def axes_of_calls(
    pairs: Iterable[tuple[Sequence[CallShapes], Sequence[CallShapes]]], samples: tuple[int, int]
) -> CallAxes | None:
    """Compare a module's calls for two numbers of samples.

    An axis whose length is the same multiple of both numbers runs over samples, or over samples and what lies
    within each. Other lengths have to be equal: routed tokens, for instance, follow neither rule.

    Args:
        pairs: the calls of one forward pass with the first number of samples and of one with the second.
        samples: the two numbers.

    Returns:
        The axes; None where some tensor is neither divided nor shared, or calls contradict each other.
    """
    inputs: dict[str, int | None] = {}
    outputs: dict[str, int | None] = {}
    for first, second in pairs:
        if len(first) != len(second):
            return None
        for one, other in zip(first, second, strict=True):
            fits = _add(inputs, one.inputs, other.inputs, samples)
            if not fits or not _add(outputs, one.outputs, other.outputs, samples):
                return None
    return CallAxes(inputs, outputs)


def _add(known: dict[str, int | None], first: Shapes, second: Shapes, samples: tuple[int, int]) -> bool:
    """Add what two calls tell; False where they tell of no axis, or of another than known."""
    if first.keys() != second.keys():
        return False
    for place, one in first.items():
        found = sample_axis(one, second[place], samples)
        if isinstance(found, str) or known.setdefault(place, found) != found:
            return False
    return True


def sample_axis(
    first: tuple[int, ...], second: tuple[int, ...], samples: tuple[int, int]
) -> int | str | None:
    """The axis over samples of a tensor, from its shapes for two numbers of them.

    Returns:
        The axis; None where both shapes are the same; why there is none, where they do not follow.
    """
    if len(first) != len(second):
        return "it has another number of axes"
    changed = [axis for axis, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    if not changed:
        return None
    axis = changed[0]
    if len(changed) > 1 or first[axis] * samples[1] != second[axis] * samples[0]:
        return "its size does not follow the number of samples"
    return axis if first[axis] % samples[0] == 0 else "its size is no multiple of the number of samples"


def of_sample(tensor: Tensor, axis: int | None, i: int, n: int) -> Tensor:
    """What belongs to sample i of n: all of a tensor that the samples share.

    Raises:
        FisherscopeError: the axis cannot be divided among the samples.
    """
    if axis is None:
        return tensor
    share, rest = divmod(tensor.shape[axis], n)
    if rest:
        raise FisherscopeError(
            f"axis {axis} of a tensor of shape {tuple(tensor.shape)} runs over samples, and cannot be "
            f"divided among {n} of them"
        )
    return tensor.narrow(axis, i * share, share)


def can_have_own_rows(tensor: Tensor) -> bool:
    """Whether a tensor that all samples share, such as T5's position biases, may broadcast over them."""
    return tensor.dim() > 1 and tensor.shape[0] == 1


def floating(output: Any) -> list[Tensor]:
    """The tensors of floating point in what a module returns, in order."""
    return [
        leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def all_agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two lists of results of the same call are the same up to rounding."""
    return len(found) == len(expected) and all(map(agree, found, expected))


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether two results of the same call are the same up to rounding."""
    if one.shape != other.shape:
        return False
    coarse = max(torch.finfo(one.dtype).eps, torch.finfo(other.dtype).eps)
    tolerance = max(1e-3, 8 * coarse)
    first, second = one.detach().double(), other.detach().double()
    finite = second[torch.isfinite(second)]
    size = float(finite.abs().max()) if len(finite) else 0.0
    return torch.allclose(first, second, rtol=tolerance, atol=tolerance * size, equal_nan=True)
