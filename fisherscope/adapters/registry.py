"""The one place where architectures are registered, and where a model's layout is found."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from fisherscope.adapters.build import Stack, build_layout, build_modules
from fisherscope.adapters.derived import derived_maps
from fisherscope.adapters.detect import detect
from fisherscope.adapters.probe import verify_layout
from fisherscope.adapters.repeats import shared_modules
from fisherscope.adapters.tuned_heads import with_adapters
from fisherscope.errors import AdapterError
from fisherscope.layout import ModelLayout
from fisherscope.plugins import Plugins

logger = logging.getLogger(__name__)

Adapter = Callable[[nn.Module, Any], Stack | Sequence[Stack]]
Verify = Literal["first", "all", False]

_FAMILIES = ("gpt2", "llama", "fused", "experts", "encoders")
_plugins = Plugins("fisherscope.adapters", *(f"fisherscope.adapters.families.{name}" for name in _FAMILIES))

_adapters: dict[str, Adapter] = {}


def register(*model_types: str) -> Callable[[Adapter], Adapter]:
    """Decorator: the function describes these ``config.model_type`` values.

    The function takes the model and its text config and returns a :class:`~fisherscope.adapters.build.Stack`,
    or several. A registration for a known type replaces it, with a notice.
    """

    def decorate(function: Adapter) -> Adapter:
        register_adapter(function, *model_types)
        return function

    return decorate


def register_adapter(function: Adapter, *model_types: str) -> None:
    """Register an adapter without decorator syntax.

    Raises:
        ValueError: no model type was given.
    """
    if not model_types:
        raise ValueError("name at least one config.model_type that the adapter describes")
    for model_type in model_types:
        if _plugins.have_built_in and _adapters.get(model_type, function) is not function:
            logger.warning("the adapter for model_type %r is replaced by %s", model_type, function)
        _adapters[model_type] = function


def known_model_types() -> list[str]:
    """All model types with an adapter, sorted."""
    _plugins.load()
    return sorted(_adapters)


def registered_adapter(model_type: str) -> Adapter | None:
    """The adapter of a model type, if there is one."""
    _plugins.load()
    return _adapters.get(model_type)


def resolve(
    model: nn.Module,
    *,
    adapter: Adapter | str | None = None,
    verify: Verify = "first",
    strict: bool = False,
) -> ModelLayout:
    """The layout of a model, verified.

    A model type that nobody registered is looked at more closely: projections and head counts are found
    from its structure, and believed where the probe confirms them. Where it does not, a warning says so, and
    the layout has the modules and their rows.

    Modules that run several times in a forward pass are found by running one.

    What LoRA adds to a projection is cut into the heads or channels that were verified there.

    Args:
        model: a transformers model.
        adapter: an adapter to use in place of the registered one, or the model type whose adapter to use.
        verify: check the layout on the live model: the "first" layer of each kind, "all" layers, or not at
            all (False). What is detected is always checked.
        strict: heads that cannot be confirmed are an error and not a warning.

    Raises:
        AdapterError: an adapter describes another model than this one, the probe found that its layout is
            wrong, or ``strict`` and heads were not found or could not be confirmed.
    """
    layout = _described(model, adapter, verify=verify, strict=strict)
    return replace(layout, shared=shared_modules(model))


def _described(
    model: nn.Module, adapter: Adapter | str | None, *, verify: Verify, strict: bool
) -> ModelLayout:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise AdapterError(
            f"{type(model).__name__} has no HuggingFace config: fisherscope.wrap takes a transformers model, "
            "for instance AutoModelForCausalLM.from_pretrained(...)"
        )
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    model_types = [config.model_type]
    # of an encoder-decoder the text config is the decoder's: its adapter knows nothing of the encoder
    if not getattr(config, "is_encoder_decoder", False):
        model_types.append(text_config.model_type)
    chosen = _choose(adapter, *model_types)
    if chosen is None:
        found = _detected(model, config.model_type, every_layer=verify == "all", strict=strict)
        return with_adapters(model, found)
    try:
        layout = _registered(model, chosen, text_config, verify)
    except AdapterError:
        computed = derived_maps(model)
        if not computed:
            raise
        return with_adapters(model, _without_computed(model, config.model_type, computed, strict=strict))
    if not layout.attention:
        message = (
            f"{_name_of(chosen)}, the adapter for model_type {config.model_type!r}, found attention in no "
            "layer: there will be no heads. Check the paths of its optional patterns, see docs/adapters.md"
        )
        if strict:
            raise AdapterError(message)
        warnings.warn(message, stacklevel=4)
    return with_adapters(model, layout)


def _registered(model: nn.Module, adapter: Adapter, text_config: Any, verify: Verify) -> ModelLayout:
    """The layout as an adapter describes it, verified if asked for."""
    config: Any = model.config
    try:
        layout = build_layout(model, config.model_type, adapter(model, text_config))
        if verify:
            verify_layout(model, layout, every_layer=verify == "all")
    # an adapter for other models stumbles over what they do not have
    except (AttributeError, ValueError, LookupError, TypeError) as error:
        raise AdapterError(
            f"{_name_of(adapter)} does not describe this {type(model).__name__} (model_type "
            f"{config.model_type!r}): {type(error).__name__}: {error}. Pass another adapter, or correct it"
        ) from error
    return layout


def _without_computed(
    model: nn.Module, model_type: str, computed: dict[str, str], *, strict: bool
) -> ModelLayout:
    """The layout of a model in which some matrices are computed: heads where plain matrices confirm them."""
    path, how = next(iter(computed.items()))
    what = (
        f"the weight of {path} is computed from other parameters by {how} "
        f"(so with {len(computed) - 1} more): it has no entries of its own to cut heads or channels from"
    )
    way_on = (
        "make it plain first, with torch.nn.utils.prune.remove or torch.nn.utils.parametrize."
        "remove_parametrizations"
    )
    if strict:
        raise AdapterError(f"{what}; {way_on}, or pass strict=False")
    try:
        detection = detect(model, model_type)
        layout = detection.layout
    except AdapterError:
        layout = build_modules(model, model_type)
    warnings.warn(
        f"{what}. Gradients of those parameters are exact and there by module; heads are there where plain "
        f"matrices confirm them. For all heads {way_on}",
        stacklevel=5,
    )
    return layout if layout.attention else replace(layout, source="modules")


def _name_of(adapter: Adapter) -> str:
    name = getattr(adapter, "__qualname__", None)
    return f"{adapter.__module__}.{name}" if name else repr(adapter)


def _choose(adapter: Adapter | str | None, *model_types: str) -> Adapter | None:
    if callable(adapter):
        return adapter
    if adapter is None:
        return next((found for name in model_types if (found := registered_adapter(name))), None)
    found = registered_adapter(adapter)
    if found is None:
        raise AdapterError(
            f"no adapter is registered for {adapter!r}: `fisherscope adapters` lists the known model types"
        )
    return found


def _detected(model: nn.Module, model_type: str, *, every_layer: bool, strict: bool) -> ModelLayout:
    """The layout as far as it is confirmed, with a warning for what is not."""
    try:
        detection = detect(model, model_type)
        layout, missing, reason = detection.layout, list(detection.without_heads), detection.reason
        if every_layer:
            verify_layout(model, layout, every_layer=True)
    except AdapterError as error:
        layout, missing, reason = build_modules(model, model_type), [], str(error)
    if layout.attention and not missing:
        return layout
    where = f"{len(missing)} of its modules ({missing[0]}, ...)" if layout.attention else "any layer"
    message = (
        f"no adapter is registered for model_type {model_type!r}, and no heads could be confirmed in "
        f"{where}: {reason}. What is left there is modules and rows; for heads, describe the layers in about "
        "ten lines with fisherscope.adapters.register, see docs/adapters.md"
    )
    if strict:
        raise AdapterError(message)
    warnings.warn(message, stacklevel=5)
    return layout if layout.attention else replace(layout, source="modules")
