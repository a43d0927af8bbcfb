"""The same sum of squared per-sample gradients by other libraries, each where it is installed.

Every peer is a function of no arguments that returns ``{parameter: sum_i g_i ** 2}`` for the weights of the
linear layers of the blocks. Each works on a copy of the model, as these libraries attach things to what they
are given.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import sample_losses
from torch import Tensor, nn

Squares = dict[str, Tensor]
Peer = Callable[[], Squares]
CHUNK = 16  # vmap holds all per-sample gradients of a chunk at once


def peers(model: nn.Module, ids: Tensor, names: list[str]) -> Iterator[tuple[str, Peer | str]]:
    """Name of each peer and its function, or the word why it is left out.

    Args:
        model: a causal language model of transformers; it is not changed.
        ids: ``[n, T]``.
        names: parameters to be covered.
    """
    yield "loop of single samples", loop(model, ids, names)
    yield "torch.func vmap", vmap(model, ids, names)
    for name, package, make in (
        ("Opacus", "opacus", opacus),
        ("BackPACK BatchGrad, then squared", "backpack", backpack_batch_grad),
        ("BackPACK SumGradSquared", "backpack", backpack_sum_grad_squared),
        ("Kronfluence diagonal", "kronfluence", kronfluence),
    ):
        if not all(isinstance(model.get_submodule(n.rpartition(".")[0]), nn.Linear) for n in names):
            yield name, "knows nn.Linear only"
        elif importlib.util.find_spec(package) is None:
            yield name, "not installed"
        else:
            yield name, make(model, ids, names)


def loop(model: nn.Module, ids: Tensor, names: list[str]) -> Peer:
    """One forward and backward pass for each sample."""
    mine, chosen = _copy(model, names)

    def run() -> Squares:
        squares = {name: torch.zeros_like(p) for name, p in chosen.items()}
        for row in ids:
            sample_losses(mine, row.unsqueeze(0)).sum().backward()
            for name, p in chosen.items():
                squares[name].addcmul_(_given(p.grad), _given(p.grad))
                p.grad = None
        return squares

    return run


def vmap(model: nn.Module, ids: Tensor, names: list[str]) -> Peer:
    """``vmap(grad(loss))`` over chunks of samples."""
    mine, chosen = _copy(model, names)
    values = {name: p.detach() for name, p in chosen.items()}
    rest = {k: p.detach() for k, p in mine.named_parameters() if k not in chosen}

    def loss(wanted: Squares, row: Tensor) -> Tensor:
        def forward(**inputs: Any) -> Any:
            return torch.func.functional_call(mine, {**rest, **wanted}, (), inputs)

        return sample_losses(forward, row.unsqueeze(0)).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))

    def run() -> Squares:
        squares = {name: torch.zeros_like(p) for name, p in values.items()}
        for start in range(0, len(ids), CHUNK):
            for name, found in gradients(values, ids[start : start + CHUNK]).items():
                squares[name] += found.square_().sum(0)
        return squares

    return run


def opacus(model: nn.Module, ids: Tensor, names: list[str]) -> Peer:
    """The hooks of Opacus, which form the gradients of all samples; they do nothing in evaluation mode."""
    from opacus import GradSampleModule

    mine, chosen = _copy(model, names)
    mine.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = GradSampleModule(mine, loss_reduction="sum", strict=False)

    def run() -> Squares:
        sample_losses(wrapped, ids).sum().backward()
        squares = {}
        for name, p in chosen.items():
            squares[name] = p.grad_sample.square().sum(0)
            p.grad = p.grad_sample = None
        return squares

    return run


def backpack_batch_grad(model: nn.Module, ids: Tensor, names: list[str]) -> Peer:
    """BackPACK's gradients of all samples, squared and added up afterwards."""
    from backpack.extensions import BatchGrad

    return _backpack(model, ids, names, BatchGrad(), "grad_batch", lambda g: g.square().sum(0))


def backpack_sum_grad_squared(model: nn.Module, ids: Tensor, names: list[str]) -> Peer:
    """BackPACK's own sum of squared gradients."""
    from backpack.extensions import SumGradSquared

    return _backpack(model, ids, names, SumGradSquared(), "sum_grad_squared", lambda g: g)


def _backpack(
    model: nn.Module,
    ids: Tensor,
    names: list[str],
    extension: Any,
    field: str,
    reduce: Callable[[Tensor], Tensor],
) -> Peer:
    """BackPACK on the linear layers alone: it has no other layer of a transformer."""
    from backpack import backpack, extend

    mine, chosen = _copy(model, names)
    for name in names:
        extend(mine.get_submodule(name.rpartition(".")[0]))

    def run() -> Squares:
        with backpack(extension):
            sample_losses(mine, ids).sum().backward()
        squares = {}
        for name, p in chosen.items():
            squares[name] = reduce(getattr(p, field))
            delattr(p, field)
            p.grad = None
        return squares

    return run


def kronfluence(model: nn.Module, ids: Tensor, names: list[str]) -> Peer:
    """Kronfluence's diagonal strategy: squares added up in the backward hook."""
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.eigen import fit_lambda_matrices_with_loader
    from kronfluence.task import Task
    from kronfluence.utils.constants import LAMBDA_MATRIX_NAME
    from kronfluence.utils.state import State

    modules = [name.rpartition(".")[0] for name in names]

    class NextToken(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            del sample
            return sample_losses(model, batch).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return modules

    task, state = NextToken(), State()
    mine = prepare_model(copy.deepcopy(model), task)
    options = FactorArguments(strategy="diagonal", use_empirical_fisher=True)

    def run() -> Squares:
        _, found = fit_lambda_matrices_with_loader(mine, state, task, [ids], options, disable_tqdm=True)
        matrices = found[LAMBDA_MATRIX_NAME]
        # a bias is a further column
        return {
            name: matrices[module][:, : model.get_parameter(name).shape[1]]
            for name, module in zip(names, modules, strict=True)
        }

    return run


def _copy(model: nn.Module, names: list[str]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy in which the chosen parameters alone are trainable."""
    mine = copy.deepcopy(model)
    wanted = set(names)
    for name, p in mine.named_parameters():
        p.requires_grad_(name in wanted)
    return mine, {name: p for name, p in mine.named_parameters() if name in wanted}


def _given(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient
