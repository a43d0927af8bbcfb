"""BackPACK's first-order quantities as functions of per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from backpack.extensions import BatchGrad, BatchL2Grad, SumGradSquared, Variance
from backpack.extensions.backprop_extension import BackpropExtension
from torch import Tensor

from fisherscope.linalg import PerSampleGradient

Quantity = Callable[[PerSampleGradient, BackpropExtension], Tensor]


def quantity_of(extension: BackpropExtension) -> Quantity | None:
    """How an extension's result follows from per-sample gradients; None for an extension of the user's own.

    A subclass computes something else, perhaps, so only the four classes themselves are known.
    """
    return _QUANTITIES.get(type(extension))


def _batch_grad(gradient: PerSampleGradient, extension: BackpropExtension) -> Tensor:
    """``[N, *shape]``, or the chosen samples of them."""
    chosen = extension.get_subsampling()
    return gradient.dense() if chosen is None else gradient.dense()[chosen]


def _sum_grad_squared(gradient: PerSampleGradient, _extension: BackpropExtension) -> Tensor:
    """``[*shape]``, without forming the gradients of all samples."""
    return gradient.square_sum()


def _batch_l2(gradient: PerSampleGradient, _extension: BackpropExtension) -> Tensor:
    """Squared norms, ``[N]``, by the cheaper of two routes."""
    return gradient.norms([None])[0].squeeze(1)


def _variance(gradient: PerSampleGradient, _extension: BackpropExtension) -> Tensor:
    """Population variance over the samples of the batch, ``[*shape]``."""
    square = torch.zeros(gradient.shape, device=gradient.device, dtype=torch.float32)
    total = torch.zeros_like(square)
    gradient.accumulate(square=square, total=total)
    return (square / gradient.n - (total / gradient.n).square()).clamp_min_(0)


_QUANTITIES: dict[type[BackpropExtension], Quantity] = {
    BatchGrad: _batch_grad,
    BatchL2Grad: _batch_l2,
    SumGradSquared: _sum_grad_squared,
    Variance: _variance,
}
