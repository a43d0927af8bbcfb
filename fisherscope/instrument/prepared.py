"""A model made ready for collection, and left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from fisherscope.adapters.injected import plain_layer
from fisherscope.adapters.unwrap import uncompiled
from fisherscope.errors import AdapterError
from fisherscope.instrument.batch_axes import floating
from fisherscope.instrument.replay import without_cache


@contextmanager
def prepared(model: nn.Module, *, forward_only: bool = False) -> Iterator[None]:
    """Evaluation mode, frozen parameters and a graph that starts at the embedding output.

    Frozen parameters keep autograd from forming the weight-gradient products which the rules form anyway,
    and from touching ``.grad``. Modes and ``requires_grad`` are restored on any exit.

    Args:
        model: the model.
        forward_only: no backward pass follows, so that there is nothing for checkpoints to spare.
    """
    modes = [(module, module.training) for module in model.modules()]
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def start_graph(_module: nn.Module, _args: Any, output: Any) -> Any:
        if torch.is_grad_enabled():
            for tensor in floating(output):
                if not tensor.requires_grad:
                    tensor.requires_grad_()
        return output

    handles = [module.register_forward_hook(start_graph) for module in _token_embeddings(model)]
    try:
        model.eval()
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        checkpointed = nullcontext() if forward_only else _checkpointed(model)
        with uncompiled(model), checkpointed, torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing where the user has enabled it: transformers leaves it out in evaluation mode."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    changed = [layer for layer in layers if layer.gradient_checkpointing and "forward" not in vars(layer)]
    try:
        for layer in changed:
            layer.forward = _checkpointed_forward(layer)
        yield
    finally:
        for layer in changed:
            vars(layer).pop("forward", None)


def _checkpointed_forward(layer: nn.Module) -> Callable[..., Any]:
    forward, checkpoint = layer.forward, layer._gradient_checkpointing_func

    def run(*args: Any, **kwargs: Any) -> Any:
        # a cache would be appended to a second time when the layer is run again
        named = {key: without_cache(value) for key, value in kwargs.items()}
        if "use_cache" in named:
            named["use_cache"] = False
        return checkpoint(partial(forward, **named), *map(without_cache, args))  # type: ignore[operator]

    return run


def input_embeddings(model: nn.Module) -> nn.Module:
    """What a model's input goes through first.

    Raises:
        AdapterError: the model does not say.
    """
    try:
        found: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        raise AdapterError(
            f"{type(model).__name__} does not say where its input is embedded (get_input_embeddings), so "
            "there is no place for a graph of gradients to begin: it cannot be collected from"
        ) from None
    return found


def _token_embeddings(model: nn.Module) -> list[nn.Module]:
    """The embedding of the input, and others with its weight: T5's encoder and decoder have one each."""
    embeddings = input_embeddings(model)
    shared = getattr(plain_layer(embeddings), "weight", None)
    same = (m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is shared)
    return list(dict.fromkeys([embeddings, *same]))
