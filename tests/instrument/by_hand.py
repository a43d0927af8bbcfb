"""Inputs and output gradients of linear maps, one unpadded sample at a time, by plain hooks and autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import models

Row = dict[str, list[int]]


@dataclass
class Factors:
    """Of one map and one sample: ``a [T, in]`` and ``d [T, out]``, float64, all calls after one another."""

    a: Tensor
    d: Tensor


def causal(model: nn.Module, row: Row) -> Tensor:
    """Summed next-token losses."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(row["labels"])[1:], ignore_index=-100, reduction="sum")


def masked(model: nn.Module, row: Row) -> Tensor:
    """Summed losses of the masked positions."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    return F.cross_entropy(logits, torch.tensor(row["labels"]), ignore_index=-100, reduction="sum")


def paired(model: Any, row: Row) -> Tensor:
    """Summed losses of an encoder-decoder's target."""
    labels = torch.tensor([row["target"]])
    shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
    logits = model(input_ids=torch.tensor([row["input_ids"]]), decoder_input_ids=shifted).logits[0]
    return F.cross_entropy(logits, labels[0], reduction="sum")


def factors(
    model: nn.Module, paths: list[str], data: list[Row], loss: Callable[[nn.Module, Row], Tensor]
) -> list[dict[str, Factors]]:
    """For each row the factors of the maps at these paths."""
    found = []
    for row in data:
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in paths}

        def hook_of(path: str, calls: dict[str, list[tuple[Tensor, Tensor]]] = calls) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                output.retain_grad()
                calls[path].append((args[0].detach(), output))

            return hook

        handles = [model.get_submodule(path).register_forward_hook(hook_of(path)) for path in paths]
        loss(model, row).backward()  # type: ignore[no-untyped-call]
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
        found.append({path: _joined(each) for path, each in calls.items()})
    return found


def _joined(calls: list[tuple[Tensor, Tensor]]) -> Factors:
    a = [given.reshape(-1, given.shape[-1]).double() for given, _ in calls]
    d = [_gradient(output).reshape(-1, output.shape[-1]).double() for _, output in calls]
    return Factors(torch.cat(a), torch.cat(d))


def _gradient(output: Tensor) -> Tensor:
    return torch.zeros_like(output) if output.grad is None else output.grad


def call_twice(module: nn.Module) -> None:
    """Make a module call itself a second time, on half of its input."""
    inside = {"now": False}

    class Twice(type(module)):  # type: ignore[misc]
        def __call__(self, x: Tensor) -> Tensor:
            if inside["now"]:
                return super().__call__(x)
            inside["now"] = True
            try:
                return super().__call__(x) + super().__call__(0.5 * x).tanh()
            finally:
                inside["now"] = False

    module.__class__ = Twice


# models that count positions themselves are padded on the right alone
CASES = [
    *((name, side) for name in ("llama", "llama-biases", "gpt2", "opt") for side in ("right", "left")),
    ("qwen2_moe", "right"),
    ("bert", "right"),
    ("t5", "right"),
]


def data_of(name: str) -> tuple[list[Row], Callable[[nn.Module, Row], Tensor]]:
    """Rows of unequal length for a model of tests/models.py, and their loss."""
    rows = models.rows(7)
    if name == "t5":
        targets = [[5 + i, 9, 4, 7 + i][: 2 + i % 3] for i in range(7)]
        return [
            {"input_ids": r["input_ids"], "target": t} for r, t in zip(rows, targets, strict=True)
        ], paired
    if name == "bert":
        for row in rows:
            row["labels"] = [-100 if place % 3 else token for place, token in enumerate(row["input_ids"])]
        return rows, masked
    return rows, causal
