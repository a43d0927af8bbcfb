"""A layer rule as one of BackPACK's module extensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.firstorder.base import FirstOrderModuleExtension
from backpack.extensions.module_extension import ModuleExtension
from torch import Tensor, nn
from typing_extensions import override

from fisherscope.errors import CoverageError
from fisherscope.instrument.backpack.quantities import quantity_of
from fisherscope.instrument.rules import LayerCall, find_rule
from fisherscope.linalg import PerSampleGradient

_COMPLETE = "_fisherscope_gradients"


class RuleModuleExtension(FirstOrderModuleExtension):  # type: ignore[misc]
    """Computes ``BatchGrad``, ``BatchL2Grad``, ``SumGradSquared`` and ``Variance`` through a layer's rule.

    In a model that was made ready by :func:`~fisherscope.instrument.backpack.extend` the per-sample gradients
    come from all calls and all modules of a parameter. Under BackPACK's own hooks they are those of the one
    call that BackPACK shows.
    """

    def __init__(self, previous: ModuleExtension | None = None) -> None:
        """Serves any layer type and quantity.

        Args:
            previous: what an extension had for the type, for layers to which no rule applies.
        """
        # the rule, not the type, says which parameters there are
        super().__init__(params=[])
        self._previous = previous

    @override
    def __call__(
        self,
        extension: BackpropExtension,
        module: nn.Module,
        g_inp: tuple[Tensor | None, ...],
        g_out: tuple[Tensor, ...],
    ) -> None:
        """Save the quantity on each of the module's parameters.

        Args:
            extension: one of BackPACK's four first-order extensions.
            module: the layer, with ``input0`` where BackPACK's own hooks call.
            g_inp: for what the extension had before.
            g_out: gradient of the layer's output.

        Raises:
            CoverageError: no rule is known for the module, or the extension is none of the four.
        """
        complete = vars(module).pop(_COMPLETE, None)
        if complete is None and find_rule(module) is None and self._previous is not None:
            self._previous(extension, module, g_inp, g_out)
            return
        quantity = quantity_of(extension)
        if quantity is None:
            raise CoverageError(
                f"{type(extension).__name__} is not a quantity that follows from a fisherscope rule: give it "
                f"a module extension of its own for {type(module).__name__} with set_module_extension"
            )
        with torch.no_grad():
            gradients = _of_one_call(module, g_out[0]) if complete is None else complete
            for name, gradient in gradients.items():
                setattr(getattr(module, name), extension.savefield, quantity(gradient, extension))


def register(extension: BackpropExtension, *layer_types: type[nn.Module]) -> None:
    """Let one of BackPACK's four first-order extensions use fisherscope's rules for these layer types.

    :func:`~fisherscope.instrument.backpack.extend` does so by itself for every layer of a model. By hand
    it is of use under BackPACK's own ``extend``, which shows one call of a layer at a time: there a layer
    must be called once, with one row per sample, and its parameters must not be tied.

    Args:
        extension: an instance, which is changed; what it had for these types is replaced.
        layer_types: exact types, as in BackPACK.
    """
    known = vars(extension)["_BackpropExtension__module_extensions"]  # there is no public way to read them
    for layer_type in layer_types:
        previous = known.get(layer_type)
        if not isinstance(previous, RuleModuleExtension):
            extension.set_module_extension(layer_type, RuleModuleExtension(previous), overwrite=True)


def save_quantity(
    extension: BackpropExtension, module: nn.Module, gradients: Mapping[str, PerSampleGradient]
) -> None:
    """Have BackPACK save the quantity of complete per-sample gradients, given by name within the module."""
    register(extension, type(module))
    vars(module)[_COMPLETE] = gradients
    try:
        extension(module, (), ())
    finally:
        vars(module).pop(_COMPLETE, None)


def _of_one_call(module: Any, output_gradient: Tensor) -> Mapping[str, PerSampleGradient]:
    rule = find_rule(module)
    if rule is None:
        raise CoverageError(
            f"no rule for {type(module).__name__}: register one with fisherscope.register_rule"
        )
    given = module.input0
    wanted = {name for name in rule.handles if wants_gradient(module, name)}
    call = LayerCall(given.float() if given.is_floating_point() else given, output_gradient.float())
    return rule.gradients(module, call, frozenset(wanted))


def wants_gradient(module: nn.Module, name: str) -> bool:
    """Whether a module has a parameter of that name which is not frozen."""
    parameter = getattr(module, name, None)
    return isinstance(parameter, nn.Parameter) and parameter.requires_grad
