"""Models whose gradients cannot be had as they are: sharded, offloaded, quantised or compiled in part."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fisherscope.adapters.kinds import is_a
from fisherscope.errors import AdapterError

_GATHER = (
    "load the model unsharded, or gather its weights with torch.distributed.checkpoint.state_dict."
    "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) into a model that is whole"
)
_LOAD_PLAIN = "load the model without quantization_config, in bfloat16 where memory is short"
# What packed weights are kept in. Integers of 64 bits are indices, and of no matter.
_CODES = frozenset({torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32})
_QUANTISED_PACKAGES = ("torch.ao.nn", "torch.ao.quantization", "torch.nn.quantized", "torch.nn.qat")


def refuse_unusable(model: nn.Module) -> None:
    """Refuse a model whose weights are not all there, or cannot be differentiated.

    Args:
        model: any module; its submodules and parameters are looked at, nothing is run.

    Raises:
        AdapterError: the model is sharded over processes, a part of it has been replaced by a compiled one,
            its weights are quantised, offloaded or were never loaded.
    """
    _refuse_sharded(model)
    _refuse_compiled_parts(model)
    _refuse_quantised(model)
    _refuse_offloaded(model)


def _refuse_sharded(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for kind in ("FullyShardedDataParallel", "FSDPModule"):
            if is_a(module, "torch.distributed", kind):
                raise AdapterError(
                    f"{path or 'the model'} is sharded by FSDP ({kind}): heads are cut across processes, and "
                    f"none holds whole weights; {_GATHER}"
                )
    for name, parameter in model.named_parameters():
        if is_a(parameter, "torch.distributed", "DTensor"):
            raise AdapterError(
                f"{name} is a DTensor (of tensor parallelism or FSDP): its heads are cut across processes; "
                f"{_GATHER}"
            )
        if hasattr(parameter, "ds_id"):
            raise AdapterError(
                f"{name} is partitioned by DeepSpeed ZeRO-3: no process holds the whole weight; save the "
                "gathered weights, and load the model without DeepSpeed or with stage 2"
            )


def _refuse_compiled_parts(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if is_a(module, "torch._dynamo", "OptimizedModule"):
            raise AdapterError(
                f"{path} has been replaced by torch.compile(...), which renames the parameters below it: "
                "pass the model before that, or compile parts in place with .compile(), which renames nothing"
            )


def _refuse_quantised(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    # what loads weights of GGUF, or dequantises others, leaves these behind: the weights decide
    is_said = getattr(config, "quantization_config", None) is not None or getattr(
        model, "is_quantized", False
    )
    for path, module in model.named_modules():
        found = _quantised(module, is_likely=bool(is_said))
        if found is not None:
            raise AdapterError(f"{path} {found}: quantised weights have no gradient; {_LOAD_PLAIN}")


def _quantised(module: nn.Module, *, is_likely: bool) -> str | None:
    """What is quantised in a module itself, as the rest of a sentence; None if nothing is.

    Where the model is said to be quantised, any table of small integers is taken for packed weights.
    """
    kind = type(module)
    if any(f"{kind.__module__}.".startswith(f"{package}.") for package in _QUANTISED_PACKAGES):
        return f"is a {kind.__module__}.{kind.__qualname__}"
    for name, parameter in module.named_parameters(recurse=False):
        if hasattr(type(parameter), "__tensor_flatten__"):
            return f"has a {name} of type {type(parameter).__name__}"
        if parameter.dtype.itemsize == 1 and parameter.dtype != torch.bool:
            return f"has a {name} of type {parameter.dtype}"
    if is_likely or hasattr(module, "in_features") or hasattr(module, "infeatures"):
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.dtype in _CODES:
                return f"has a {name} of type {tensor.dtype}"
    return None


def _refuse_offloaded(model: nn.Module) -> None:
    next_step = "load it whole on its devices"
    for path, module in model.named_modules():
        for hook in _accelerate_hooks(module):
            if getattr(hook, "offload", False) or is_a(hook, "accelerate", "CpuOffload"):
                raise AdapterError(
                    f"{path or 'the model'} is offloaded: accelerate brings its weights only while it runs; "
                    f"{next_step}"
                )
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    missing += [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if missing:
        raise AdapterError(
            f"{len(missing)} parameters or buffers have no data ({missing[0]}, ...): the model is offloaded "
            f"or was never loaded; {next_step}"
        )


def _accelerate_hooks(module: nn.Module) -> list[Any]:
    """The hooks that accelerate has put on a module; several are held by one that runs them in turn."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return []
    return list(getattr(hook, "hooks", [hook]))
