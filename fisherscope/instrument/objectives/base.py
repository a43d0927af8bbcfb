"""What an objective is: how rows are read, and what the model predicts where there is a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisherscope.errors import FisherscopeError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.data import Encoder, Labelling
from fisherscope.instrument.data.next_token import encode_next_token


@dataclass(frozen=True)
class Predictions:
    """What a model says of each label of a batch, one distribution over classes per label.

    Given the model's input the labels are independent of each other, as all of the named objectives have it.

    Attributes:
        logits: ``[m, classes]``, float32 or wider.
        targets: the data's labels, ``[m]`` int64.
        sample: which sample of the batch each belongs to, ``[m]`` int64, in ascending order.
    """

    logits: Tensor
    targets: Tensor
    sample: Tensor

    def __post_init__(self) -> None:
        if not (self.logits.dim() == 2 and self.targets.shape == self.sample.shape == self.logits.shape[:1]):
            raise FisherscopeError(
                f"predictions need logits [m, classes], targets [m] and sample [m], not "
                f"{tuple(self.logits.shape)}, {tuple(self.targets.shape)} and {tuple(self.sample.shape)}"
            )
        if bool((self.sample.diff() < 0).any()):
            raise FisherscopeError("the labels of predictions must come in the order of their samples")
        if self.logits.dtype.itemsize < 4:
            raise FisherscopeError(f"the logits of predictions are {self.logits.dtype}: make them float32")

    def unit_losses(self, targets: Tensor | None = None) -> Tensor:
        """``-log p`` of each label, ``[m]``, in nats: the data's, or others in their place."""
        return F.cross_entropy(self.logits, self.targets if targets is None else targets, reduction="none")

    def losses(self, n: int, targets: Tensor | None = None) -> Tensor:
        """The sum over the labels of each of ``n`` samples, ``[n]``."""
        units = self.unit_losses(targets)
        return units.new_zeros(n).index_add(0, self.sample, units)

    @property
    def place(self) -> Tensor:
        """The how-manieth label of its sample each is, ``[m]`` int64."""
        counts = torch.bincount(self.sample)
        starts = counts.cumsum(0) - counts
        return (
            torch.arange(len(self.sample), device=self.sample.device, dtype=torch.int64) - starts[self.sample]
        )


Predict = Callable[[nn.Module, Batch], Predictions | Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss for every sample.

    Attributes:
        name: identity that a resumed run must match.
        predict: ``(model, batch)`` -> :class:`Predictions`, or the summed losses ``[n]`` themselves, in
            which case only the data's labels can be had.
        encode: how a row of a task is read.
        labelling: what the labels stand beside.
        label_range: whether labels are token ids or classes.
        is_drawn: whether rows are changed at random, as by masking, so that samples depend on the seed.
        parts: what decides the results of a function of the user's own, by name, as it was when it was handed
            over; nothing for fisherscope's own.
    """

    name: str
    predict: Predict
    encode: Encoder = encode_next_token
    labelling: Labelling = "next"
    label_range: Literal["vocabulary", "classes"] = "vocabulary"
    is_drawn: bool = False
    parts: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_named(self) -> bool:
        """Whether it is one of fisherscope's own, and not a function of the user's."""
        return str(getattr(self.predict, "__module__", "")).startswith("fisherscope.instrument.objectives.")

    def run(self, model: nn.Module, batch: Batch) -> Predictions | Tensor:
        """What the model says of a batch.

        Raises:
            FisherscopeError: a function of the user's own returned something else.
        """
        found = self.predict(model, batch)
        if not isinstance(found, Predictions | Tensor):
            raise FisherscopeError(
                f"the objective {self.name!r} returned {_named(found)}: it must return the sum of each "
                "sample's losses, a tensor [n], or fisherscope.Predictions"
            )
        return found

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Each sample's loss under the data's labels, ``[n]``, in nats."""
        found = self.run(model, batch)
        return found.losses(len(batch)) if isinstance(found, Predictions) else found


def _named(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def at_labels(logits: Tensor, labels: Tensor) -> Predictions:
    """Predictions where there is a label: ``logits [n, L, classes]`` beside ``labels [n, L]``.

    Raises:
        FisherscopeError: the model predicts something else.
    """
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise FisherscopeError(
            f"the model's predictions {tuple(logits.shape)} do not stand beside labels "
            f"{tuple(labels.shape)}: its head is for another objective"
        )
    targets = labels.to(logits.device)
    bears_loss = targets != -100
    chosen = logits[bears_loss]
    if chosen.dtype.itemsize < 4:
        chosen = chosen.float()
    return Predictions(chosen, targets[bears_loss], bears_loss.nonzero()[:, 0])
