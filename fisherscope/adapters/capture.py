"""Running a model on a small input with changed outputs, and seeing what reaches a module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from fisherscope.adapters.inputs import run_small
from fisherscope.errors import AdapterError
from fisherscope.layout import Partition


class _Captured(BaseException):
    """Ends the forward pass once the tensor looked for is known."""


def capture_input(
    model: nn.Module,
    where: str,
    changes: dict[str, Callable[[Tensor], None]],
    rows: int,
    generator: torch.Generator,
    what: str,
) -> Tensor:
    """The input of one module, ``[rows, positions, features]``, with changed outputs before it."""
    captured: list[Tensor] = []

    def capture(_module: nn.Module, args: tuple[Any, ...]) -> None:
        captured.append(args[0].detach())
        raise _Captured

    with ExitStack() as stack:
        for path, change in changes.items():
            hook = _replace_output(change, rows, generator)
            stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        handle = model.get_submodule(where).register_forward_pre_hook(capture)
        stack.callback(handle.remove)
        stack.enter_context(suppress(_Captured))
        run_small(model, rows, generator.initial_seed())
    if not captured:
        raise AdapterError(f"{where} was never called: it is not {what}")
    if captured[0].shape[0] % rows:
        raise AdapterError(f"{where} is given {captured[0].shape[0]} rows for {rows}: it mixes samples")
    return captured[0].reshape(rows, -1, captured[0].shape[-1])


def _replace_output(
    change: Callable[[Tensor], None], rows: int, generator: torch.Generator
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """A forward hook that gives all rows the same random output, and then each row its changes."""

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        if output.numel() % (rows * output.shape[-1]):
            raise AdapterError(f"a projection gives {tuple(output.shape)} for {rows} rows: it mixes samples")
        positions = output.numel() // (rows * output.shape[-1])
        noise = torch.randn(
            positions, output.shape[-1], generator=generator, dtype=torch.float32, device="cpu"
        )
        out = noise.repeat(rows, 1, 1)
        change(out)
        return out.reshape(output.shape).to(output)

    return hook


def beyond_rounding(changed: Tensor, plain: Tensor) -> Tensor:
    """Where a row differs from its reference by more than rounding, relative to the larger of the two."""
    tolerance = max(1.5 * torch.finfo(plain.dtype).eps, 1e-4)
    largest = torch.maximum(changed.abs(), plain.abs())
    # a row of zeros is compared with others, too
    scale = largest.flatten(1).amax(1).clamp_min(1e-6 * float(largest.max()))
    return (changed - plain).abs() > tolerance * scale.view(-1, *(1,) * (plain.dim() - 1))


def projection_of(partition: Partition) -> str:
    """The module whose output is the projection's: PEFT adds to the plain layer's."""
    return partition.module.partition(".base_layer")[0]
