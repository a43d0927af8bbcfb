"""Losses under other labels than the data's, each to have a backward pass of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fisherscope.errors import FisherscopeError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.objectives import Predictions

LabelSource = Literal["data", "sampled", "exact", "exact_per_token"]
"""Where labels come from: "data"; "sampled" from the model; "exact", the expectation over its predictions;
"exact_per_token", the data's labels with each one its own unit."""

LABEL_SOURCES: tuple[str, ...] = get_args(LabelSource)

_MOST_PASSES = 1024


@dataclass(frozen=True)
class Draw:
    """One backward pass.

    Attributes:
        losses: of each sample, ``[n]``.
        weight: of the squared gradients, beside the normalisation; None to average over T in its place.
    """

    losses: Tensor
    weight: float | None


def draws(source: str, predictions: Predictions, batch: Batch, *, count: int, seed: int) -> Iterator[Draw]:
    """The backward passes of a label source; squares of their gradients are to be added up.

    Args:
        source: "sampled", "exact" or "exact_per_token".
        predictions: of the model.
        batch: the samples.
        count: draws of "sampled".
        seed: of what is drawn.

    Raises:
        FisherscopeError: "exact" would take too many passes.
    """
    makers: dict[str, Callable[[], Iterator[Draw]]] = {
        "sampled": lambda: _sampled(predictions, batch, count, seed),
        "exact": lambda: _exact(predictions, batch),
        "exact_per_token": lambda: _per_token(predictions, batch),
    }
    return makers[source]()


def number_of_draws(source: str, predictions: Predictions, *, count: int) -> int:
    """How many backward passes :func:`draws` makes."""
    labels = int(predictions.place.max()) + 1
    return {"sampled": count, "exact": labels * predictions.logits.shape[1]}.get(source, labels)


def _sampled(predictions: Predictions, batch: Batch, count: int, seed: int) -> Iterator[Draw]:
    """Labels drawn from what the model predicts: F in expectation, the mean of ``count`` squares."""
    uniform = _uniform(predictions, batch, count, seed)
    cumulative = predictions.logits.detach().double().softmax(-1).cumsum(-1)
    for k in range(count):
        targets = torch.searchsorted(cumulative, uniform[:, k : k + 1].contiguous()).squeeze(1)
        yield Draw(predictions.losses(len(batch), targets.clamp_max(cumulative.shape[1] - 1)), 1 / count)


def _uniform(predictions: Predictions, batch: Batch, count: int, seed: int) -> Tensor:
    """Numbers in [0, 1), ``[m, count]``: a sample's own, whatever batch it is in."""
    lengths = torch.bincount(predictions.sample, minlength=len(batch)).tolist()
    rows = []
    for key, length in zip(batch.keys, lengths, strict=True):
        content = hashlib.sha256(f"{seed} {key}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(content[:8], "little"))
        rows.append(generator.random((length, count)))
    return torch.from_numpy(np.concatenate(rows)).to(predictions.logits.device)


def _exact(predictions: Predictions, batch: Batch) -> Iterator[Draw]:
    """Every class of every label, weighted with its probability.

    Labels are independent given the input and the gradients of their log-probabilities have mean zero under
    the model, so the expected square of a sum over labels is the sum of expected squares.
    """
    place, classes = predictions.place, predictions.logits.shape[1]
    most = int(place.max()) + 1
    if most * classes > _MOST_PASSES:
        raise FisherscopeError(
            f"the exact Fisher enumerates {classes} classes of {most} labels per sample, a pass for each: "
            f"more than {_MOST_PASSES} are refused; use labels='sampled'"
        )
    probabilities = predictions.logits.detach().softmax(-1)
    for t in range(most):
        here = place == t
        for c in range(classes):
            targets = torch.full_like(predictions.targets, c)
            scale = probabilities[:, c].sqrt() * here
            units = predictions.unit_losses(targets) * scale
            yield Draw(units.new_zeros(len(batch)).index_add(0, predictions.sample, units), 1.0)


def _per_token(predictions: Predictions, batch: Batch) -> Iterator[Draw]:
    """The data's labels one at a time, so that no two of a sample's share a square."""
    place = predictions.place
    for t in range(int(place.max()) + 1):
        units = predictions.unit_losses() * (place == t)
        yield Draw(units.new_zeros(len(batch)).index_add(0, predictions.sample, units), None)
