"""Half precision that loses no small values: float16 with a power of two as scale of each row."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 15  # the largest value of a row is brought to at most 2 ** 15, half of what float16 can hold
_SMALLEST_SCALE = -126  # the exponent of the smallest normal float32


def row_scales(values: Tensor, dims: int) -> Tensor:
    """The powers of two by which rows are divided before they are rounded to float16.

    A power of two changes no digit: what is lost is the rounding to 11 bits alone, and below 2 ** -29 of the
    row's largest value digits one by one.

    Args:
        values: any shape.
        dims: a row is what the last so many axes hold.

    Returns:
        ``values.shape[:-dims]``, float32; 1 for a row of zeros.
    """
    lead = values.shape[: values.dim() - dims]
    if not values.numel():
        return torch.ones(lead, device=values.device, dtype=torch.float32)
    largest = values.detach().reshape(*lead, -1).abs().amax(-1).double()
    mantissa, exponent = torch.frexp(largest)
    # a power of two is its own bound: rounding twice is then rounding once
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent) - LARGEST
    scales = torch.ldexp(torch.ones_like(largest), exponent.clamp_min(_SMALLEST_SCALE))
    return torch.where(largest > 0, scales, torch.ones_like(scales)).float()


def to_half(values: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Round to float16 with a scale per row.

    Args:
        values: any shape, floating point.
        dims: a row is what the last so many axes hold.

    Returns:
        float16 of the same shape, and the scales of :func:`row_scales`.
    """
    scales = row_scales(values, dims)
    exact = values.detach() if values.dtype.itemsize >= 4 else values.detach().float()
    return (exact / _beside(scales, dims).to(exact.dtype)).half(), scales


def from_half(half: Tensor, scales: Tensor) -> Tensor:
    """What :func:`to_half` rounded, float32."""
    return half.float().mul_(_beside(scales, half.dim() - scales.dim()))


def rounded(values: Tensor, dtype: str, dims: int) -> Tensor:
    """The values as a store of that element type gives them back, float32.

    Args:
        values: any shape, floating point.
        dtype: "bfloat16", "float32", or "float16", which has a scale per row.
        dims: a row is what the last so many axes hold.
    """
    if dtype == "float16":
        return from_half(*to_half(values, dims))
    return values.detach().to(getattr(torch, dtype)).float()


def _beside(scales: Tensor, dims: int) -> Tensor:
    return scales.reshape(*scales.shape, *(1,) * dims)
