"""One call of one watched layer, between its forward and its backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherscope.instrument.kept import Kept
from fisherscope.instrument.rules import LayerCall


class Use:
    """What a rule needs of a call. Several backward passes may follow one forward pass.

    Tensors of ``flattened`` samples are unfolded to ``[n, positions, features]`` for the rule.
    """

    def __init__(
        self, inputs: Tensor, outputs: Tensor, *, flattened: int | None = None, scale: float = 1.0
    ) -> None:
        """Keep what went in and what came out.

        Args:
            inputs: what the layer was given.
            outputs: what it returned.
            flattened: number of samples, where the first axis holds samples and positions; else None.
            scale: the output is this many times what the rule takes it for.
        """
        self._inputs: Kept | None = Kept(inputs)
        self._outputs: Kept | None = Kept(outputs)
        self._dtype = outputs.dtype
        self._flattened = flattened
        self._scale = scale
        self._output_gradient: Tensor | None = None

    def keep_output_gradient(self, gradient: Tensor) -> None:
        """Wait for the gradient of the input."""
        self._output_gradient = gradient.detach()

    def call(self, dtype: torch.dtype, input_gradient: Tensor | None) -> LayerCall:
        """What the rule gets; images that are rounded, or were changed in place since, are left out."""
        if self._output_gradient is None or self._inputs is None or self._outputs is None:
            raise RuntimeError("a layer's gradients came in an order that no backward pass has")
        gradient, self._output_gradient = self._output_gradient.to(dtype), None
        inputs = self._inputs.get()
        outputs = self._outputs.get_unless_changed() if self._dtype == dtype else None
        exact = input_gradient is not None and input_gradient.dtype == dtype
        return LayerCall(
            inputs=self._by_sample(inputs.to(dtype) if inputs.is_floating_point() else inputs),
            output_gradient=self._by_sample(gradient if self._scale == 1 else gradient * self._scale),
            outputs=None if outputs is None else self._by_sample(outputs),
            input_gradient=self._by_sample(input_gradient.detach())
            if exact and input_gradient is not None
            else None,
        )

    def release(self) -> None:
        """No backward pass follows: let go of the tensors before the graph does."""
        self._inputs = self._outputs = None

    def _by_sample(self, tensor: Tensor) -> Tensor:
        return tensor if self._flattened is None else torch.unflatten(tensor, 0, (self._flattened, -1))
