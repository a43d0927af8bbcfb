"""From what users hold to the transformers model whose layers are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import nn

from fisherscope.adapters.injected import refuse_tuner_layers, refuse_tuners
from fisherscope.adapters.kinds import is_a
from fisherscope.adapters.usable import refuse_unusable
from fisherscope.errors import AdapterError

# package and name of a wrapper, and where it keeps the model
_WRAPPERS = (
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch._dynamo", "OptimizedModule", "_orig_mod"),
    ("deepspeed", "DeepSpeedEngine", "module"),
)
_EXPECTED = "pass a transformers model, such as AutoModelForCausalLM.from_pretrained(...)"


def unwrap(model: Any) -> nn.Module:
    """The transformers model inside whatever has been put around it.

    Wrappers may be nested in any order: ``DistributedDataParallel``, ``DataParallel``,
    ``torch.compile(model)``, PEFT models (their adapters' layers stay where they are, among the model's own)
    and DeepSpeed engines up to ZeRO stage 2.

    Args:
        model: what the user holds. Nothing in it changes.

    Returns:
        The model itself, not a copy.

    Raises:
        AdapterError: this is not a transformers model, or one whose gradients cannot be had: sharded,
            quantised, offloaded, compiled in part, or with an adapter that lives outside of its layers.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(_not_a_model(model))
    found: nn.Module = model
    while (inner := _inside(found)) is not None:
        found = inner
    if not _is_transformers_model(found):
        raise AdapterError(_not_a_transformers_model(found))
    refuse_unusable(found)
    refuse_tuner_layers(found)
    return found


def unwrap_pipeline(thing: Any, tokenizer: Any = None) -> tuple[Any, Any]:
    """Model and tokenizer of a ``transformers`` pipeline; anything else as it came.

    Args:
        thing: a pipeline, or what is to be given to :func:`unwrap`.
        tokenizer: one that goes before the pipeline's own.

    Returns:
        The model, still wrapped, and the tokenizer or None.
    """
    if not is_a(thing, "transformers.pipelines", "Pipeline"):
        return thing, tokenizer
    return thing.model, thing.tokenizer if tokenizer is None else tokenizer


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run a model that was compiled in place, or parts of it, without its compiled code for a while.

    Compiled code does not call hooks that were registered after it was made. It stays cached, and is used
    again afterwards. Where nothing in the model is compiled this does nothing, so that functions which are
    compiled for themselves, such as flex attention, remain so.

    Args:
        model: after :func:`unwrap`.
    """
    if not any(_is_compiled(module) for module in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _is_compiled(module: nn.Module) -> bool:
    """By ``module.compile()``, or by ``module.forward = torch.compile(module.forward)``."""
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or hasattr(module.forward, "_torchdynamo_orig_callable")


def _inside(model: nn.Module) -> nn.Module | None:
    """What a wrapper is wrapped around; None where the model is no wrapper."""
    wrapper: Any = model
    inner: nn.Module | None = None
    for package, name, attribute in _WRAPPERS:
        if is_a(wrapper, package, name):
            inner = getattr(wrapper, attribute)
    if is_a(wrapper, "peft", "PeftModel") or is_a(wrapper, "peft", "PeftMixedModel"):
        refuse_tuners(wrapper.peft_config)
        inner = wrapper.base_model.model
    return inner


def _is_transformers_model(model: nn.Module) -> bool:
    has_config = hasattr(getattr(model, "config", None), "model_type")
    return has_config and callable(getattr(model, "get_input_embeddings", None))


def _not_a_transformers_model(model: nn.Module) -> str:
    name = type(model).__name__
    for path, module in model.named_modules():
        if _is_transformers_model(module):
            return (
                f"{name} has no HuggingFace config, but holds a {type(module).__name__}: "
                f"pass that, model.{path}"
            )
    return f"{name} has no HuggingFace config: {_EXPECTED}"


def _not_a_model(thing: Any) -> str:
    """What to pass instead."""
    name = type(thing).__name__
    if isinstance(thing, str | PathLike):
        return (
            f"{str(thing)!r} is the name of a model, not a model: load it with "
            f"AutoModelForCausalLM.from_pretrained({str(thing)!r}), and pass that"
        )
    if isinstance(thing, type):
        return f"{thing.__name__} is a class, not a model: {_EXPECTED}"
    if hasattr(thing, "model_type"):
        return (
            f"{name} is a config, not a model: load the weights with from_pretrained, or make a random model "
            "with AutoModelForCausalLM.from_config(config)"
        )
    if is_a(thing, "transformers", "PreTrainedTokenizerBase"):
        return f"{name} is a tokenizer: the model goes first, fisherscope.wrap(model, tokenizer)"
    if isinstance(getattr(thing, "model", None), nn.Module):
        return f"{name} is not a model, but holds one: pass its .model"
    if isinstance(thing, dict):
        return f"a {name} is not a model: load its weights into one with model.load_state_dict(...)"
    return f"{thing!r:.60} is not a model: {_EXPECTED}"
