"""The one place where layer rules are registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from fisherscope.adapters.derived import derived_tensors
from fisherscope.linalg import PerSampleGradient
from fisherscope.plugins import Plugins


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, as its rule sees it. All tensors are detached.

    Attributes:
        inputs: what went in, ``[n, ..., features]``, in the compute dtype; ids as they are.
        output_gradient: gradient of the summed losses with respect to what came out, likewise.
        outputs: what came out, where it is exact in the compute dtype and nobody has changed it since.
        input_gradient: gradient with respect to what went in, where the backward pass has formed it.
    """

    inputs: Tensor
    output_gradient: Tensor
    outputs: Tensor | None = None
    input_gradient: Tensor | None = None


RuleFunction = Callable[[nn.Module, LayerCall, frozenset[str]], dict[str, PerSampleGradient]]

_LAYERS = ("linear", "conv1d", "embedding", "norm", "conv2d")
_plugins = Plugins("fisherscope.rules", *(f"fisherscope.instrument.rules.{name}" for name in _LAYERS))


@dataclass(frozen=True)
class Rule:
    """How one type of layer yields per-sample gradients.

    Attributes:
        handles: names of the layer's own parameters that the rule knows, such as ("weight", "bias").
        gradients: ``(module, call, wanted) -> {name: PerSampleGradient}``, where ``wanted`` is a subset of
            ``handles``.
        applies: whether the rule holds for a module of its type; not, for instance, for a subclass that
            computes something else.
        looks_up: whether the layer looks up rows of a table: its input is ids, ``[n, T]`` int64.
    """

    handles: tuple[str, ...]
    gradients: RuleFunction
    applies: Callable[[nn.Module], bool] | None = None
    looks_up: bool = False


_rules: dict[type[nn.Module], Rule] = {}


def register_rule(
    *layer_types: type[nn.Module],
    handles: tuple[str, ...] = ("weight", "bias"),
    applies: Callable[[nn.Module], bool] | None = None,
    looks_up: bool = False,
) -> Callable[[RuleFunction], RuleFunction]:
    """Decorator: the function yields the per-sample gradients of these layer types and their subclasses.

    The rule of the most derived type wins; registering a type again replaces its rule. ``applies`` tells for
    single modules whether the rule holds.
    """

    def decorate(function: RuleFunction) -> RuleFunction:
        for layer_type in layer_types:
            _rules[layer_type] = Rule(handles, function, applies, looks_up)
        return function

    return decorate


def find_rule(module: nn.Module) -> Rule | None:
    """The first rule that applies to a layer, by its type and then its base types; None if there is none.

    A rule gives the gradient of the weight that the layer multiplies with: where that is computed from other
    parameters, it is not theirs.
    """
    if derived_tensors(module):
        return None
    _plugins.load()
    for layer_type in type(module).__mro__:
        if layer_type in _rules:
            rule = _rules[layer_type]
            if rule.applies is None or rule.applies(module):
                return rule
    return None
