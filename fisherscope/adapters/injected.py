"""Layers that PEFT has put around a model's own: the plain layer inside, and adapters that lose gradients."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fisherscope.adapters.kinds import is_a
from fisherscope.errors import AdapterError

# Tuners that use the weight they wrap in one way only, by calling its layer. With others (HiRA, GLoRA,
# SHiRA, ...) part of its gradient passes that call by. The tests check each of these.
_TUNERS = frozenset(
    {
        "adalora",
        "c3a",
        "delora",
        "fourierft",
        "gralora",
        "ia3",
        "ln_tuning",
        "loha",
        "lokr",
        "lora",
        "miss",
        "oft",
        "vblora",
        "vera",
        "waveft",
    }
)
# Layers of LoRA that multiply weights and call nothing, and variants that call LoRA's matrices as layers.
_FUNCTIONAL_LAYERS = ("ParamWrapper", "MultiheadAttention")
_CALLING_VARIANTS = ("DoraLinearVariant", "DoraEmbeddingVariant")
# what the paths of a model's own layers have more where PEFT is around them
_LEVELS = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")
_MERGE = "merge it into the weights, where PEFT can: model = model.merge_and_unload(), and pass that"


def projection(lookup: Callable[[str], nn.Module], path: str) -> tuple[str, nn.Module]:
    """The layer that a path means, through whatever PEFT has put around it.

    Args:
        lookup: gives the module at a path.
        path: where the layer is without PEFT, such as "model.layers.0.self_attn.q_proj".

    Returns:
        Path and module of the plain layer: "...q_proj.base_layer" where an adapter stands around it,
        "...q_proj.modules_to_save.default" where PEFT trains a copy of it, else the path as it is.
    """
    found = ""
    for name in path.split("."):
        found = f"{found}.{name}" if found else name
        module = lookup(found)
        while (inner := _inner_path(module)) is not None:
            found = f"{found}.{inner}"
            module = lookup(found)
    return found, module


def plain_layer(module: nn.Module) -> nn.Module:
    """The layer inside whatever PEFT has put around it; the module itself where there is nothing."""
    while (inner := _inner_path(module)) is not None:
        module = module.get_submodule(inner)
    return module


def bare_path(path: str) -> str:
    """The path that a layer has without PEFT around it: what :func:`projection` is given."""
    return _LEVELS.sub("", path)


def tuned_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers of PEFT that stand around one of the model's own, by path, the outer one first."""
    return {path: m for path, m in model.named_modules() if is_a(m, "peft.tuners", "BaseTunerLayer")}


def is_added(path: str, tuned: Iterable[str]) -> bool:
    """Whether a module or parameter is one that PEFT has added beside a layer of the model.

    Args:
        path: of the module or parameter.
        tuned: paths of the layers of PEFT.
    """
    return any(path.startswith(f"{t}.") and not path.startswith(f"{t}.base_layer") for t in tuned)


def refuse_tuners(configs: Any) -> None:
    """Refuse adapters that do not live in the model's layers.

    Args:
        configs: PEFT's mapping from adapter name to config.

    Raises:
        AdapterError: an adapter is lost where the layers are called without PEFT's own forward, or hides the
            gradients of the weights that it wraps.
    """
    for name, config in configs.items():
        tuner = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning:
            raise AdapterError(
                f"adapter {name!r} ({tuner}) prepends virtual tokens in PEFT's own forward: the transformers "
                "model inside knows nothing of them, and its gradients would be those of a model without the "
                "adapter; pass model.get_base_model() if these are what you want"
            )
        if tuner.lower() not in _TUNERS:
            raise AdapterError(
                f"adapter {name!r} is of type {tuner}: not all of its effect passes through calls of the "
                f"model's layers, so gradients would be lost; {_MERGE}"
            )


def refuse_tuner_layers(model: nn.Module) -> None:
    """Refuse adapter layers that use a weight without calling its layer.

    Raises:
        AdapterError: with the path of such a layer.
    """
    for path, module in model.named_modules():
        if not is_a(module, "peft.tuners", "BaseTunerLayer"):
            continue
        variants: Any = getattr(module, "lora_variant", {})
        others = [v for v in variants.values() if type(v).__name__ not in _CALLING_VARIANTS]
        if _tuner_of(module) not in _TUNERS or type(module).__name__ in _FUNCTIONAL_LAYERS or others:
            kind = type((others or [module])[0])
            raise AdapterError(
                f"{path} has an adapter of type {kind.__module__}.{kind.__qualname__}: not all of its effect "
                f"passes through calls of layers, so gradients would be lost; {_MERGE}"
            )


def _tuner_of(module: nn.Module) -> str:
    """Which tuner a layer belongs to, such as "lora"; empty where another package defines the layer."""
    before, _, after = type(module).__module__.partition("peft.tuners.")
    return "" if before else after.removesuffix(".layer")


def _inner_path(module: nn.Module) -> str | None:
    """Where a wrapper of PEFT keeps the layer that it stands for; None for other modules."""
    if is_a(module, "peft.tuners", "BaseTunerLayer"):
        return "base_layer"
    if is_a(module, "peft", "ModulesToSaveWrapper"):
        wrapper: Any = module
        active = wrapper.active_adapters
        in_use = not wrapper.disable_adapters and len(active) > 0 and active[0] in wrapper.modules_to_save
        return f"modules_to_save.{active[0]}" if in_use else "original_module"
    return None
