"""Which parameters of a model PEFT trains, and which take no part in what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fisherscope.adapters.injected import tuned_layers
from fisherscope.adapters.kinds import is_a

_BASE = ".base_layer"


@dataclass(frozen=True)
class Adaptation:
    """What PEFT has done to the parameters of a model.

    Attributes:
        trained: what adapters in use add, with the copies and biases that PEFT trains beside them.
        idle: parameters that take no part in what the model computes now -> why.
    """

    trained: frozenset[str]
    idle: dict[str, str]


def adaptation(model: nn.Module) -> Adaptation:
    """Sort the parameters of a model by what PEFT does with them.

    Args:
        model: after :func:`~fisherscope.adapters.unwrap.unwrap`.

    Returns:
        Names as in ``named_parameters()``; nothing in either for a model without PEFT.
    """
    tuned: dict[str, Any] = tuned_layers(model)
    added = {name: reason for path, layer in tuned.items() for name, reason in _of_tuner(path, layer)}
    copies = {start: reason for path, m in model.named_modules() for start, reason in _of_copies(path, m)}
    if not added and not copies:
        return Adaptation(frozenset(), {})
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    trained: set[str] = set()
    idle: dict[str, str] = {}
    at_work: set[str] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        canonical = own[id(parameter)]
        start = next((start for start in copies if name.startswith(start)), None)
        reason = added.get(name) if start is None else copies[start]
        if reason:
            idle[canonical] = reason
            continue
        at_work.add(canonical)
        if reason is not None:
            trained.add(canonical)
    if trained:
        trained |= _biases(model, tuned, at_work)
    return Adaptation(frozenset(trained), {n: reason for n, reason in idle.items() if n not in at_work})


def _of_tuner(path: str, layer: Any) -> Iterator[tuple[str, str | None]]:
    """Names of what a layer of PEFT adds, each with why it is idle: "" if it trains, None for bookkeeping."""
    for name, _ in layer.named_parameters(remove_duplicate=False):
        kind, _, rest = name.partition(".")
        if kind != "base_layer":
            reason = _idle(layer, rest.partition(".")[0])
            yield f"{path}.{name}", reason or (None if kind in layer.other_param_names else "")


def _idle(layer: Any, adapter: str) -> str:
    if adapter in layer.merged_adapters:
        return f"adapter {adapter!r} is merged into the weight"
    if layer.disable_adapters:
        return f"adapter {adapter!r} is disabled"
    if adapter and adapter not in layer.active_adapters:
        return f"adapter {adapter!r} is not active"
    if layer.merged:
        return f"adapter {adapter!r} is out of use while another one is merged"
    return ""


def _of_copies(path: str, module: Any) -> Iterator[tuple[str, str]]:
    """Starts of the names of what a module and its copies have, each with why it is idle, "" if it trains."""
    if not is_a(module, "peft", "ModulesToSaveWrapper"):
        return
    in_use = list(module.active_adapters)[:1] if not module.disable_adapters else []
    in_use = [name for name in in_use if name in module.modules_to_save]
    if in_use:
        yield f"{path}.original_module.", f"adapter {in_use[0]!r} has a copy in its place"
    for adapter in module.modules_to_save:
        state = "disabled" if module.disable_adapters else "not active"
        reason = "" if adapter in in_use else f"adapter {adapter!r} is {state}"
        yield f"{path}.modules_to_save.{adapter}.", reason


def _biases(model: nn.Module, layers: dict[str, Any], names: set[str]) -> set[str]:
    """The model's own biases that adapters in use train, as ``LoraConfig(bias=...)`` says."""
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    active = {name for layer in layers.values() for name in layer.active_adapters}
    wanted = {getattr(config, "bias", "none") for name, config in configs.items() if name in active}
    biases = {name for name in names if name.endswith(".bias")}
    if "all" in wanted:
        return biases
    if "lora_only" in wanted:
        return {name for name in biases if name.removesuffix(".bias").removesuffix(_BASE) in layers}
    return set()
