"""What a collection needs to know of a model and its tokenizer."""

from __future__ import annotations

import operator
from typing import Any, Literal

import torch
from torch import nn

from fisherscope.adapters.injected import plain_layer
from fisherscope.instrument.objectives import Objective
from fisherscope.instrument.prepared import input_embeddings


class ModelFacts:
    """Properties of a model and its tokenizer that no config says alone.

    Attributes:
        model, tokenizer: what they are properties of.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        """Nothing is looked up before it is asked for."""
        self.model = model
        self.tokenizer = tokenizer

    @property
    def embeddings(self) -> nn.Module:
        """What the model's input goes through first."""
        return plain_layer(input_embeddings(self.model))

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return next(self.embeddings.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.embeddings.parameters()).dtype

    @property
    def vocabulary(self) -> int | None:
        """How many token ids there are; None for a model of images."""
        size: int | None = getattr(self.embeddings, "num_embeddings", None)
        return size

    def max_positions(self) -> int | None:
        """How long a row may be, where positions are learned; None where they are computed."""
        limit: int | None = getattr(self.model.config, "max_position_embeddings", None)
        for module in self.model.modules():
            if not isinstance(module, nn.Embedding) or module is self.embeddings or limit is None:
                continue
            # OPT and BART keep rows before the first position
            if module.num_embeddings == limit + int(getattr(module, "offset", 0)):
                # RoBERTa counts positions from behind its padding index
                return limit - (0 if module.padding_idx is None else module.padding_idx + 1)
        return None

    def pad_id(self) -> int:
        """Any id of the vocabulary serves: pads are masked and bear no loss.

        A tokenizer without pad token is no problem, nor is a pad token that was added to it without a row in
        the model's table of embeddings.
        """
        # some heads look for the pad id of the config to tell text from padding
        for source in (self.model.config, self.tokenizer):
            value = getattr(source, "pad_token_id", None)
            for pad in value if isinstance(value, list | tuple) else (value,):
                if hasattr(pad, "__index__") and 0 <= (known := operator.index(pad)) < (
                    self.vocabulary or 1 << 62
                ):
                    return known
        return 0

    def pad_side(self, objective: Objective) -> Literal["left", "right"]:
        """Only models that are told their positions may be padded on the left."""
        if objective.labelling != "next":
            return "right"
        return "left" if getattr(self.tokenizer, "padding_side", "right") == "left" else "right"
