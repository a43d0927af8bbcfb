"""What the forward methods of models take: their signatures say it, or a trial call."""

from __future__ import annotations

import inspect
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fisherscope.adapters.inputs import first_output, probe_inputs
from fisherscope.errors import AdapterError
from fisherscope.instrument.batch import Batch

# what was found out by trial calls: while hooks wait for a batch, one would be taken for a part of it
_tried: WeakKeyDictionary[nn.Module, dict[tuple[str, int], bool]] = WeakKeyDictionary()
_OWN = ("use_cache", "position_ids", "token_type_ids")


def takes(model: nn.Module, argument: str) -> bool:
    """Whether a forward pass may be given an argument of that name.

    A signature that names it says so. Behind ``**kwargs`` a trial call on a small input decides: some models
    hand on what they are given, others refuse what they do not know. Positions, which fisherscope adds of
    itself, must change what comes out.
    """
    names, anything = _signature(model)
    if argument in names:
        return True
    if not anything:
        return False
    known = _tried.setdefault(model, {})
    key = (argument, id(getattr(model.forward, "__func__", model.forward)))
    if key not in known:
        known[key] = _tried_out(model, argument)
    return known[key]


def settle_arguments(model: nn.Module) -> None:
    """Make the trial calls now, before hooks are attached."""
    for argument in _OWN:
        takes(model, argument)


def zeros_are_as_none(model: nn.Module, argument: str) -> bool:
    """Whether a forward pass with zeros for an argument is one without it, as BERT's token types are.

    GPT-2 adds an embedding for each token type that it is given, and none where it is given none.
    """
    try:
        inputs = probe_inputs(model, 1, seed=0)
        zeros = torch.zeros_like(inputs["input_ids"])
        with torch.no_grad():
            without = first_output(model, inputs)
            return torch.equal(without, first_output(model, inputs | {argument: zeros}))
    except (AdapterError, KeyError):
        return False


def reachable_arguments(model: nn.Module) -> frozenset[str]:
    """Names that a forward pass may be given: those of the signature and of what ``**kwargs`` leads to."""
    found, anything = _signature(model)
    for kind in type(model).__mro__:
        if not anything:
            return found
        if "forward" in vars(kind) and kind is not nn.Module:
            names, anything = _parameters(vars(kind)["forward"])
            found |= names
    base = getattr(model, "base_model", model)
    return found if base is model or not isinstance(base, nn.Module) else found | _signature(base)[0]


def text_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Ids, mask and, where there are two texts, which is which.

    Positions are the model's own affair: batches of these models are padded on the right.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.token_types is not None and takes(model, "token_type_ids"):
        inputs["token_type_ids"] = batch.token_types
    if takes(model, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def _signature(model: nn.Module) -> tuple[frozenset[str], bool]:
    return _parameters(model.forward)


def _parameters(forward: Any) -> tuple[frozenset[str], bool]:
    """Names, and whether there may be others."""
    parameters = inspect.signature(forward).parameters.values()
    starred = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = frozenset(p.name for p in parameters if p.kind not in starred) - {"self"}
    return names, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _tried_out(model: nn.Module, argument: str) -> bool:
    try:
        inputs = probe_inputs(model, 1, seed=0)
    except AdapterError:
        return False
    inputs.pop("use_cache", None)
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        return False
    extra: Any = False
    if argument != "use_cache":
        extra = torch.zeros_like(ids)
        extra[:, 2:] = 1
    if argument == "position_ids":
        extra = extra * 2 + torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device)
    devices = [ids.device] if ids.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with_it = first_output(model, inputs | {argument: extra}, exactly=True)
            warned = any(argument in str(warning.message) for warning in said)
            if argument != "position_ids":
                return not warned
            without = first_output(model, inputs)
        except AdapterError:
            return False
    return not warned and not torch.equal(with_it, without)
