"""Where numbers come from beside the weights: readable, so that a refusal can say what is another now."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fisherscope.instrument.model_facts import ModelFacts

# what says where, when and by which class a config was saved, or how outputs are packed
_BOOKKEEPING = frozenset({"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"})


def environment(facts: ModelFacts) -> dict[str, str]:
    """What may change roundings: in another environment the same model gives almost the same numbers."""
    import transformers

    device = facts.device
    return {
        "device": device.type
        if device.type == "cpu"
        else f"{device.type}, {torch.cuda.get_device_name(device)}",
        "attention": str(getattr(facts.model.config, "_attn_implementation", None)),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def surroundings(model: nn.Module) -> dict[str, str]:
    """What beside its weights makes a model another one, as far as it shows: hints for a message."""
    config: Any = model.config
    found = {f"config {key}": value for key, value in _flat("", config.to_dict())}
    for path, module in model.named_modules():
        where = path or type(model).__name__
        for kind, hooks in (("forward", module._forward_hooks), ("pre-forward", module._forward_pre_hooks)):
            names = [_name(hook) for hook in hooks.values() if not _name(hook).startswith(__package__[:11])]
            if names:
                found[f"{kind} hooks of {where}"] = ", ".join(names)
        if isinstance(getattr(module, "scaling", None), Mapping):
            found[f"adapter scaling of {where}"] = _plain(dict(module.scaling))
            active = getattr(module, "active_adapters", None)
            found[f"active adapters of {where}"] = _plain(list(active) if active else active)
            found[f"adapters disabled at {where}"] = _plain(getattr(module, "disable_adapters", None))
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is another, each as "name: old value in the store, new value now"."""
    return [
        f"{key}: {before.get(key, 'nothing')} in the store, {now.get(key, 'nothing')} now"
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key)
    ]


def _name(hook: Any) -> str:
    return f"{getattr(hook, '__module__', '')}.{getattr(hook, '__qualname__', type(hook).__qualname__)}"


def _flat(prefix: str, values: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if str(key) in _BOOKKEEPING:
            continue
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", _plain(value)


def _plain(value: Any) -> str:
    """A short text that prints."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = ascii(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


_LONGEST = 200
