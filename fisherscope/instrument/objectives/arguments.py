"""What the forward methods of models take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn

from fisherscope.instrument.batch import Batch


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has an argument of that name."""
    return argument in _arguments(type(model).forward)


@lru_cache(maxsize=64)
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


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
