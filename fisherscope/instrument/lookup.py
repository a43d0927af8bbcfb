"""Which rows of its table an embedding looked up, and by what it multiplied them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from fisherscope.errors import FisherscopeError


@dataclass(frozen=True)
class Lookup:
    """One call of an embedding.

    Attributes:
        ids: ``[n, T]`` int64, also where one row of ids serves all samples.
        scale: the output is this many times the rows.
        is_shared: whether one row of ids served all samples.
    """

    ids: Tensor
    scale: float
    is_shared: bool


def lookup_of(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
    n: int,
) -> Lookup:
    """Find the ids of a call.

    OPT counts its positions from the attention mask inside of the layer, and Gemma scales what it has looked
    up: where an embedding has a forward of its own, that is run again to see what it asks of the table.

    Raises:
        FisherscopeError: the ids have no sample axis, or the output is something else than scaled rows.
    """
    scale, name = 1.0, type(module).__name__
    ids = args[0] if args else next(iter(kwargs.values()))
    if getattr(forward, "__func__", None) is not nn.Embedding.forward:
        with torch.no_grad(), _Watch() as watch:
            forward(*args, **kwargs)
        if len(watch.found) != 1:
            raise FisherscopeError(
                f"{name} looks up its table {len(watch.found)} times in a call: leave its weight out with "
                "parameters=[...]"
            )
        ids, rows = watch.found[0]
        scale = _scale(module, rows, output)
    if not has_samples(ids, n):
        raise FisherscopeError(
            f"{name} is given ids of shape {tuple(ids.shape)} for {n} samples: leave its weight out with "
            "parameters=[...]"
        )
    is_shared = ids.dim() == 1 or ids.shape[0] != n
    return Lookup(ids.reshape(-1, ids.shape[-1]).expand(n, -1), scale, is_shared)


def has_samples(ids: Tensor, n: int) -> bool:
    """Whether ids are ``[n, T]``, or ``[1, T]`` or ``[T]`` for all samples."""
    return ids.dim() == 1 or (ids.dim() == 2 and ids.shape[0] in {1, n})


def own_rows(output: Tensor, n: int) -> Tensor:
    """What one row of ids has looked up, ``[n, T, E]``: with rows for each of ``n`` samples."""
    return output.reshape(-1, *output.shape[-2:]).expand(n, -1, -1)


def _scale(module: nn.Module, rows: Tensor, output: Tensor) -> float:
    looked_up, given = rows.detach().float(), output.detach().float()
    square = float(looked_up.square().sum())
    scale = float((looked_up * given).sum()) / square if square else 1.0
    tolerance = 8 * torch.finfo(output.dtype).eps * float(given.abs().max())
    if float((given - scale * looked_up).abs().max()) > tolerance:
        raise FisherscopeError(
            f"{type(module).__name__} does more to the rows it looks up than scale them: leave its weight "
            "out with parameters=[...]"
        )
    return scale


class _Watch(TorchFunctionMode):
    """Notes the calls of ``F.embedding``: ids, and the rows that came back."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if func is F.embedding:
            self.found.append((args[0], result))
        return result
