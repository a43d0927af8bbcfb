"""The one place where architectures are registered, and where a model's layout is found."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal

from torch import nn

from fisherscope.adapters.build import Family, build_layout
from fisherscope.adapters.probe import verify_layout
from fisherscope.errors import AdapterError
from fisherscope.layout import ModelLayout

logger = logging.getLogger(__name__)

FamilyFunction = Callable[[nn.Module, Any], Family]
Probe = Literal["first", "all", False]

ENTRY_POINT_GROUP = "fisherscope.adapters"
_BUILT_IN = tuple(f"fisherscope.adapters.families.{name}" for name in ("gpt2", "llama", "fused", "experts"))

_families: dict[str, FamilyFunction] = {}
_loaded = False


def register(*model_types: str) -> Callable[[FamilyFunction], FamilyFunction]:
    """Decorator: the function describes these ``config.model_type`` values.

    The function takes the model and its text config and returns a
    :class:`~fisherscope.adapters.build.Family`. A registration for a known type replaces it, with a notice.
    """

    def decorate(function: FamilyFunction) -> FamilyFunction:
        register_adapter(function, *model_types)
        return function

    return decorate


def register_adapter(function: FamilyFunction, *model_types: str) -> None:
    """Register a family function without decorator syntax.

    Raises:
        ValueError: no model type was given.
    """
    if not model_types:
        raise ValueError("name at least one config.model_type that the adapter describes")
    for model_type in model_types:
        if _loaded and model_type in _families and _families[model_type] is not function:
            logger.warning("the adapter for model_type %r is replaced by %s", model_type, function)
        _families[model_type] = function


def known_model_types() -> list[str]:
    """All model types with an adapter, sorted."""
    _load()
    return sorted(_families)


def resolve(model: nn.Module, *, probe: Probe = "first") -> ModelLayout:
    """The layout of a model, verified.

    Args:
        model: a transformers model.
        probe: check the layout on the live model: the "first" attention layer of each kind, "all" layers,
            or not at all (False).

    Raises:
        AdapterError: no adapter for this model type, or the probe found that the layout is wrong.
    """
    _load()
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise AdapterError(
            f"{type(model).__name__} has no HuggingFace config: fisherscope.wrap takes a transformers model, "
            "for instance AutoModelForCausalLM.from_pretrained(...)"
        )
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    family = _families.get(config.model_type) or _families.get(text_config.model_type)
    if family is None:
        raise AdapterError(
            f"no adapter for model_type {config.model_type!r}: register one with "
            f"fisherscope.adapters.register, see docs/adapters.md (known: {', '.join(sorted(_families))})"
        )
    layout = build_layout(model, config.model_type, family(model, text_config))
    if probe:
        verify_layout(model, layout, every_layer=probe == "all")
    return layout


def _load() -> None:
    """Import the built-in families, then those of other packages: at first use, never at import."""
    global _loaded  # noqa: PLW0603 - a one-time latch
    if _loaded:
        return
    for module in _BUILT_IN:
        import_module(module)
    _loaded = True
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        entry.load()
