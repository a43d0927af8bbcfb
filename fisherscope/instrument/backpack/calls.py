"""One call of one module, between its forward pass and the backward passes that follow it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fisherscope.errors import FisherscopeError
from fisherscope.instrument.kept import Kept
from fisherscope.instrument.lookup import Lookup
from fisherscope.instrument.rules import LayerCall


class Call:
    """What a rule, or a module extension of BackPACK's or of the user's own, needs of a call.

    Attributes:
        module: the module.
        path: where it is in the model.
        forward_pass: number of the forward pass that it belongs to.
        is_repeated: whether it was made in a backward pass, by reentrant checkpointing.
        fault: why a rule cannot use it; empty where it can.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        given: list[Tensor],
        output: Tensor,
        *,
        forward_pass: int,
        samples: int | None = None,
        lookup: Lookup | None = None,
        fault: str = "",
    ) -> None:
        """Keep what went in and what came out.

        Args:
            module, path: see above.
            given: the tensors that the module was given, in order.
            output: the tensor that it returned.
            forward_pass: see above.
            samples: their number where the first axis holds samples and positions; else None.
            lookup: which rows of a table were looked up, where the module is a table.
            fault: see above.
        """
        self.module, self.path, self.forward_pass, self.fault = module, path, forward_pass, fault
        self.is_repeated = graph_task() >= 0
        self._given = [Kept(tensor) for tensor in given]
        self._output = Kept(output)
        self._samples = samples
        self._lookup = lookup

    def inputs(self) -> list[Tensor]:
        """The tensors that the module was given; once in a backward pass."""
        return [kept.get() for kept in self._given]

    def for_rule(self, inputs: list[Tensor], output_gradient: Tensor) -> LayerCall:
        """The call in float32, with one row per sample.

        Raises:
            FisherscopeError: samples cannot be told apart in it.
        """
        if self.fault:
            raise FisherscopeError(self.fault)
        gradient = output_gradient.detach().float()
        if self._lookup is not None:
            return LayerCall(self._lookup.ids, gradient * self._lookup.scale)
        given = inputs[0].float() if inputs[0].is_floating_point() else inputs[0]
        return LayerCall(self._by_sample(given), self._by_sample(gradient))

    def for_backpack(
        self, inputs: list[Tensor], output_gradient: Tensor, function: Callable[..., None]
    ) -> None:
        """Call ``function(module, g_inp, g_out)`` with the module as BackPACK's own hooks leave it.

        Raises:
            FisherscopeError: the output was changed in place since.
        """
        output = self._output.get_unless_changed()
        if output is None:
            raise FisherscopeError(
                f"the output of {self.path} was changed in place after the call, and a BackPACK extension "
                "without a fisherscope rule may need it: register a rule with fisherscope.register_rule"
            )
        shown = {f"input{i}": tensor for i, tensor in enumerate(inputs)} | {"output": output}
        # past nn.Module's __setattr__: submodules may have these names, and those of BERT do
        vars(self.module).update(shown)
        try:
            function(self.module, (None,) * len(inputs), (output_gradient.detach(),))
        finally:
            for name in shown:
                vars(self.module).pop(name, None)

    def _by_sample(self, tensor: Tensor) -> Tensor:
        return tensor if self._samples is None else torch.unflatten(tensor, 0, (self._samples, -1))


def graph_task() -> int:
    """Number of the backward pass that runs now, -1 where none does."""
    return torch._C._current_graph_task_id()
