"""The extensions that run in the present backward pass."""

from __future__ import annotations

from backpack.context import CTX
from backpack.extensions.backprop_extension import BackpropExtension


def active_extensions() -> tuple[BackpropExtension, ...]:
    """Those of the ``with backpack(...)`` around it.

    Raises:
        NotImplementedError: one of them is not of first order.
    """
    active: tuple[BackpropExtension, ...] = CTX.get_active_exts()
    for extension in active:
        if extension.expects_backpropagation_quantities():
            raise NotImplementedError(
                f"{type(extension).__name__} sends more than gradients back through every module, and this "
                "model was made ready for first-order extensions only: use BatchGrad, BatchL2Grad, "
                "SumGradSquared, Variance or a first-order extension of your own"
            )
    return active
