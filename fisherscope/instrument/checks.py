"""What is checked about a model and its losses before their gradients are believed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fisherscope.errors import CoupledSamplesError, FisherscopeError, NonFiniteError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.coupling import module_outputs
from fisherscope.instrument.objectives import Objective

_TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}
_TOLERANCE_LOW_PRECISION = 1e-1
_FLOOR = 1e-2  # of the largest group: below it, rounding may be a large part of a value


def check_losses(losses: Tensor, model: nn.Module, objective: Objective, batch: Batch) -> None:
    """One finite loss per sample, or an error that names the sample and the layer.

    Raises:
        FisherscopeError: the objective returned something else than ``[n]``.
        NonFiniteError: a loss is NaN or infinite.
    """
    if losses.shape != (len(batch),):
        raise FisherscopeError(
            f"the objective must return one loss per sample, [{len(batch)}], and not {tuple(losses.shape)}: "
            "sum the token losses of each sample, do not average over the batch"
        )
    if not losses.requires_grad:
        raise FisherscopeError(
            "the losses do not depend on the model through a graph: the objective must not detach what it "
            "computes, nor run under torch.no_grad"
        )
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if bad:
        where = _first_non_finite_module(model, objective, batch)
        names = ", ".join(batch.sample_id(i) for i in bad[:5])
        raise NonFiniteError(
            f"the loss of {names} is not finite; the first module with a non-finite output is "
            f"{where}; leave these samples out, or load the model in a dtype with a larger range"
        )


def check_rows(square: Tensor, parameter_of: Callable[[int], str], batch: Batch) -> None:
    """Finite gradients only.

    Args:
        square: group values of the batch, ``[n, groups]``.
        parameter_of: name of the parameter (or MLP) of a group.
        batch: the batch.

    Raises:
        NonFiniteError: a gradient is NaN or infinite.
    """
    bad = (~torch.isfinite(square)).nonzero()
    if len(bad):
        sample, group = bad[0].tolist()
        raise NonFiniteError(
            f"the gradient of {batch.sample_id(sample)} with respect to {parameter_of(group)} is not finite: "
            "a half-precision model may overflow in the backward pass; load it in float32 or bfloat16"
        )


def check_independence(alone: Tensor, together: Tensor, sample: str, dtype: torch.dtype) -> None:
    """The same sample has the same gradient alone and among others.

    Args:
        alone, together: group values of the sample, ``[groups]``.
        sample: its id.
        dtype: the coarsest of the pass.

    Raises:
        CoupledSamplesError: the values differ by more than rounding.
    """
    difference = float(_relative_differences(alone, together).max())
    if difference > _tolerance(dtype):
        raise CoupledSamplesError(
            f"the gradient of {sample} changes by {difference:.1%} with the other samples of its batch: "
            "something couples them (batch normalisation, a loss over the whole batch, position ids that "
            "ignore padding), so per-sample gradients do not exist; use batch_size=1, remove the coupling, "
            "or pass force=True"
        )


def check_repetition(before: Tensor, after: Tensor, sample: str, dtype: torch.dtype) -> None:
    """The same sample has the same gradient before and after another one.

    Args:
        before, after: group values of the sample, ``[groups]``.
        sample: its id.
        dtype: the coarsest of the pass.

    Raises:
        CoupledSamplesError: the values differ by more than rounding.
    """
    difference = float(_relative_differences(before, after).max())
    if difference > _tolerance(dtype):
        raise CoupledSamplesError(
            f"the gradient of {sample} changes by {difference:.1%} when it is computed again after another "
            "sample: a pass leaves something behind, in the model, in a hook or in the objective, so that "
            "gradients depend on the order of samples; remove what keeps it, or pass force=True"
        )


def _relative_differences(first: Tensor, second: Tensor) -> Tensor:
    larger = torch.maximum(first, second)
    floor = _FLOOR * larger.max() + torch.finfo(first.dtype).tiny
    return (first - second).abs() / (larger + floor)


def _tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCE.get(dtype, _TOLERANCE_LOW_PRECISION)


def _first_non_finite_module(model: nn.Module, objective: Objective, batch: Batch) -> str:
    finite, _ = module_outputs(model, objective, batch, lambda output: torch.isfinite(output).all())
    wrong = (name for name, is_finite in finite.items() if not is_finite)
    return next(wrong, "none (the loss itself overflows)")
