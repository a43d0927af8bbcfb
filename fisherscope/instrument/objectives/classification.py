"""Classes of whole samples, texts or images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fisherscope.errors import FisherscopeError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.objectives.arguments import text_inputs
from fisherscope.instrument.objectives.base import Predictions, at_labels
from fisherscope.instrument.objectives.outputs import logits_of


def sequence_classification(model: nn.Module, batch: Batch) -> Predictions:
    """What is predicted of each text's class.

    Raises:
        FisherscopeError: a decoder cannot tell text from padding, or the classes are no classes.
    """
    config: Any = model.config
    if len(batch) > 1 and config.pad_token_id is None and not config.is_encoder_decoder:
        raise FisherscopeError(
            f"{type(model).__name__} reads the class off the last token that is no padding, and its config "
            "has no pad_token_id: set model.config.pad_token_id (the tokenizer's), or use batch_size=1"
        )
    return _of_classes(model, logits_of(model, model(**text_inputs(model, batch))), batch.labels)


def image_classification(model: nn.Module, batch: Batch) -> Predictions:
    """What is predicted of each image's class."""
    if batch.pixels is None:
        raise FisherscopeError('the samples are no images: give rows of "pixel_values" and "label"')
    pixels = batch.pixels.to(next(model.parameters()).dtype)
    return _of_classes(model, logits_of(model, model(pixel_values=pixels)), batch.labels)


def _of_classes(model: nn.Module, logits: Tensor, labels: Tensor) -> Predictions:
    kind = getattr(model.config, "problem_type", None)
    if logits.shape[-1] == 1 or kind == "regression":
        raise FisherscopeError(
            f"{type(model).__name__} has one output: a regression, whose targets are numbers, which rows "
            "cannot carry; cut the target into classes"
        )
    if kind != "multi_label_classification":
        return at_labels(logits.unsqueeze(1), labels)
    if labels.shape != logits.shape:
        raise FisherscopeError(
            f"{labels.shape[1]} labels per sample for {logits.shape[1]} classes that are not exclusive: give "
            "one 0 or 1 per class"
        )
    # each class is a label of its own with two outcomes, whose log-odds the model says
    return at_labels(torch.stack([torch.zeros_like(logits), logits], -1), labels)
