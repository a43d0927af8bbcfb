"""Which batches are proved: settled by the plan, so that a resumed run proves the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from fisherscope.instrument.data import Sample

Check = Literal["auto", "every", "first", "off"]
CHECKS: tuple[Check, ...] = get_args(Check)

_SHARE = 0.02  # of a long run's time
_ALWAYS = 2  # batches that are proved whatever the length of a run: without padding and with some
_COST = 2.5  # batches that one proof takes the time of
_ALONE = 4  # in a run of so few batches each proof takes a second draw


@dataclass
class Schedule:
    """Chooses the batches that are proved.

    Batches are sorted by length, so each has a shape of its own and new shapes tell nothing. What tells is
    the structure: with padding or without, one sample or several, and which modules are called. The first
    batch of each is proved, and a share of the others that is drawn by their numbers.

    Attributes:
        check: "auto", "every", "first" or "off".
        batches: of the whole run.
        seed: of the run.
    """

    check: Check
    batches: int
    seed: int
    _structures: set[tuple[bool, bool]] = field(default_factory=set)
    _called: set[str] = field(default_factory=set)
    _any: bool = False

    @property
    def rate(self) -> float:
        """The share of batches that are drawn, beside those that are always proved."""
        return max(0.0, _SHARE / _COST - _ALWAYS / max(self.batches, 1))

    @property
    def takes_second_draws(self) -> bool:
        """Whether a proof stands more or less alone, so that it is done with two draws of weights."""
        return self.check != "off" and (self.check == "first" or self.batches <= _ALONE)

    def is_due(self, task: str, number: int, samples: Sequence[Sample]) -> bool:
        """Whether a batch is to be proved, by what is known before it runs."""
        if self.check == "off":
            return False
        if self.check == "every" or not self._any:
            return True
        if self.check == "first":
            return False
        return _structure(samples) not in self._structures or self._is_drawn(task, number)

    def has_news(self, called: frozenset[str]) -> bool:
        """Whether a batch that was not due called a module that no proof has seen."""
        return self.check == "auto" and not called <= self._called

    def proved(self, samples: Sequence[Sample], called: frozenset[str]) -> None:
        """A batch of these samples has been proved."""
        self._any = True
        self._structures.add(_structure(samples))
        self._called |= called

    def _is_drawn(self, task: str, number: int) -> bool:
        content = hashlib.sha256(f"proof {self.seed} {task} {number}".encode()).digest()
        return int.from_bytes(content[:4], "little") < self.rate * 2**32


def _structure(samples: Sequence[Sample]) -> tuple[bool, bool]:
    """Whether there is padding, and whether there is more than one sample."""
    return len({(sample.length, len(sample.labels)) for sample in samples}) > 1, len(samples) > 1
