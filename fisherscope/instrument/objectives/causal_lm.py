"""Next-token prediction, summed per sample."""

from __future__ import annotations

from typing import Any

from torch import nn

from fisherscope.instrument.batch import Batch
from fisherscope.instrument.objectives.arguments import takes
from fisherscope.instrument.objectives.base import Predictions, at_labels


def causal_lm(model: nn.Module, batch: Batch) -> Predictions:
    """What is predicted of each token that bears loss, from the position before it."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if takes(model, "position_ids"):
        inputs["position_ids"] = batch.position_ids.clone()  # XGLM once added to them in place
    if batch.token_types is not None and takes(model, "token_type_ids"):
        inputs["token_type_ids"] = batch.token_types
    logits = model(**inputs, use_cache=False).logits
    return at_labels(logits[:, :-1], batch.labels[:, 1:])
