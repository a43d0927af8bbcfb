"""Targets of encoder-decoder models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fisherscope.adapters.injected import plain_layer
from fisherscope.errors import FisherscopeError
from fisherscope.instrument.batch import IGNORE, Batch
from fisherscope.instrument.objectives.arguments import text_inputs
from fisherscope.instrument.objectives.base import Predictions, at_labels
from fisherscope.instrument.objectives.outputs import logits_of
from fisherscope.instrument.prepared import input_embeddings


def seq2seq(model: nn.Module, batch: Batch) -> Predictions:
    """What the decoder predicts of each token of the target, from those before it."""
    inputs = text_inputs(model, batch) | {"decoder_input_ids": _shifted(model, batch.labels)}
    return at_labels(logits_of(model, model(**inputs)), batch.labels)


def _shifted(model: nn.Module, labels: Tensor) -> Tensor:
    """The targets, one step later, behind the token that starts a decoder."""
    config: Any = model.config
    if not getattr(config, "is_encoder_decoder", False):
        raise FisherscopeError(
            f"{type(model).__name__} has no decoder of its own: objective='seq2seq' needs one"
        )
    start, pad = config.decoder_start_token_id, config.pad_token_id
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    table = input_embeddings(model)
    size = getattr(plain_layer(table), "num_embeddings", None)
    known = isinstance(pad, int) and pad >= 0 and (size is None or pad < size)
    # one that the vocabulary does not have cannot stand at padding: any other can
    if make is not None and (known or start is None):
        made: Tensor = make(labels=labels)
        return made
    if start is None:
        raise FisherscopeError(
            f"{type(model).__name__} has no config.decoder_start_token_id to begin targets with: set it"
        )
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    return shifted.masked_fill(shifted == IGNORE, pad if known else 0)
