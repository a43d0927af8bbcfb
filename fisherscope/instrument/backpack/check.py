"""Per-sample gradients add up to the gradient that autograd finds, or a parameter is used in another way."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fisherscope.linalg import PerSampleGradient

_TOLERANCE = 0.05  # of models in bfloat16, too
_NOISE = 1e-4  # of the largest gradient; that of a key bias is nothing but rounding


class SumCheck:
    """Compares each parameter once, in the first backward pass that brings it."""

    def __init__(self) -> None:
        """Nothing has been compared."""
        self._checked: set[str] = set()
        self._largest = 0.0

    def __call__(self, name: str, gradient: PerSampleGradient, whole: Tensor) -> None:
        """Warn where the gradients of the samples do not add up.

        Args:
            name: of the parameter.
            gradient: per-sample gradients.
            whole: what autograd found, ``[*shape]``.
        """
        if name in self._checked:
            return
        self._checked.add(name)
        expected = (whole.to_dense() if whole.is_sparse else whole).detach().float()
        total = torch.zeros(gradient.shape, device=gradient.device, dtype=torch.float32)
        gradient.accumulate(total=total)
        largest = float(expected.abs().max())
        self._largest = max(self._largest, largest)
        if float((total - expected).abs().max()) > _TOLERANCE * largest + _NOISE * self._largest:
            warnings.warn(
                f"the per-sample gradients of {name} do not add up to its gradient: it is used elsewhere "
                "than in calls of its layers, or the loss has a term that depends on it directly. BackPACK's "
                "quantities are those of the calls alone",
                stacklevel=2,
            )
