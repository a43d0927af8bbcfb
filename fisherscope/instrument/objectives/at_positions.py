"""Masked tokens, and classes of tokens: each label is predicted at its own position."""

from __future__ import annotations

from torch import nn

from fisherscope.instrument.batch import Batch
from fisherscope.instrument.objectives.arguments import text_inputs
from fisherscope.instrument.objectives.base import Predictions, at_labels
from fisherscope.instrument.objectives.outputs import logits_of


def at_positions(model: nn.Module, batch: Batch) -> Predictions:
    """What is predicted of each label, from its own position."""
    return at_labels(logits_of(model, model(**text_inputs(model, batch))), batch.labels)
