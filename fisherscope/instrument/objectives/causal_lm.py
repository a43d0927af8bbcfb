"""Next-token prediction, summed per sample."""

from __future__ import annotations

from torch import nn

from fisherscope.instrument.batch import Batch
from fisherscope.instrument.objectives.arguments import takes, text_inputs
from fisherscope.instrument.objectives.base import Predictions, at_labels
from fisherscope.instrument.objectives.outputs import logits_of


def causal_lm(model: nn.Module, batch: Batch) -> Predictions:
    """What is predicted of each token that bears loss, from the position before it."""
    inputs = text_inputs(model, batch)
    if takes(model, "position_ids"):
        inputs["position_ids"] = batch.position_ids.clone()  # XGLM once added to them in place
    logits = logits_of(model, model(**inputs))
    return at_labels(logits[:, :-1], batch.labels[:, 1:])
