"""Tensors that wait for the backward pass the way autograd's own do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override


class Kept:
    """A tensor, saved in the graph of whoever runs the forward pass.

    What is saved there goes through autograd's hooks for saved tensors. So a layer's input takes no memory
    inside of a checkpointed part, which makes it again in the backward pass, and moves to the CPU where the
    user asked for that.
    """

    def __init__(self, tensor: Tensor) -> None:
        """Save the tensor; gradients must be enabled."""
        anchor = torch.empty(0, requires_grad=True, dtype=torch.float32, device="cpu")
        self._node: Any = _Keep.apply(anchor, tensor.detach()).grad_fn  # type: ignore[no-untyped-call]

    def get(self) -> Tensor:
        """The tensor; once in a backward pass.

        Raises:
            RuntimeError: it has been changed in place since.
        """
        (tensor,) = self._node.saved_tensors
        return tensor  # type: ignore[no-any-return]

    def get_unless_changed(self) -> Tensor | None:
        """The tensor, or None where it has been changed in place since."""
        try:
            return self.get()
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            return None


class _Keep(torch.autograd.Function):
    """A node that nothing depends on: it only holds."""

    @staticmethod
    @override
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return anchor.new_empty(0)

    @staticmethod
    @override
    def backward(ctx: Any, *_gradients: Tensor) -> Any:
        raise RuntimeError("nothing depends on what is kept")
