"""Proofs in the course of a run: of which batches, and what they came to."""

from __future__ import annotations

import traceback
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherscope.errors import CoverageError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.checking.batch_proof import BatchProof
from fisherscope.instrument.checking.proof import Deviation, Tolerance
from fisherscope.instrument.checking.schedule import Schedule
from fisherscope.instrument.checking.witness import Witness
from fisherscope.instrument.data import Sample
from fisherscope.instrument.extensions.base import Collector
from fisherscope.instrument.memory import is_out_of_memory, release
from fisherscope.instrument.objectives import Objective
from fisherscope.instrument.passes import BatchPass


@dataclass
class Proved:
    """What the proofs of one task came to.

    Attributes:
        batches: how many were run.
        proved: how many of them were proved.
        not_provable: how many could not be, for want of memory.
        largest: the largest deviation, as a share of its tolerance, and where it was.
        smallest_seen: the smallest relative error of one sample's gradient that could not have passed.
        tolerance: of sums of gradients.
        dtype: the coarsest of the passes.
    """

    batches: int = 0
    proved: int = 0
    not_provable: int = 0
    largest: Deviation | None = None
    smallest_seen: float = 0.0
    tolerance: float = 0.0
    dtype: str = ""

    def add(self, found: Deviation, seen: float, dtype: torch.dtype) -> None:
        """One more batch was proved."""
        self.proved += 1
        if self.largest is None or found.excess > self.largest.excess:
            self.largest = found
        self.smallest_seen = max(self.smallest_seen, seen)
        self.tolerance, self.dtype = Tolerance.of(dtype).linear, str(dtype).removeprefix("torch.")

    def to_json(self, task: str, check: str) -> dict[str, Any]:
        """As it stands in a store, beside its identity."""
        largest = self.largest
        return {
            "task": task,
            "check": check,
            "batches": self.batches,
            "proved": self.proved,
            "not_provable": self.not_provable,
            "largest_deviation": 0.0 if largest is None else largest.size,
            "largest_at": "" if largest is None else f"{largest.what} of {largest.parameter}",
            "tolerance": self.tolerance,
            "smallest_error_seen": self.smallest_seen,
            "dtype": self.dtype,
        }


class Proofs:
    """The proofs of one run."""

    def __init__(
        self, batch_pass: BatchPass, objective: Objective, schedule: Schedule, *, force: bool
    ) -> None:
        """Prove what the schedule says.

        Args:
            batch_pass: runs batches.
            objective: the loss.
            schedule: which batches.
            force: warn where a proof fails, and go on.
        """
        self._batch_pass = batch_pass
        self._objective = objective
        self._schedule = schedule
        self._force = force
        self._found: dict[str, Proved] = defaultdict(Proved)
        self._batches = 0

    def take(self, task: str) -> Proved:
        """What the proofs of a task have come to since they were taken last."""
        return self._found.pop(task, Proved())

    def begin(
        self, task: str, number: int, samples: Sequence[Sample], collectors: Sequence[Collector]
    ) -> BatchProof | None:
        """What watches the pass that comes next; None where that batch is not to be proved."""
        if not self._schedule.is_due(task, number, samples):
            return None
        return self._prepared([c for c in collectors if c.labels != "data"])

    def _prepared(self, others: Sequence[Collector]) -> BatchProof:
        seed = self._batch_pass.seed + self._batches
        witnesses = [Witness(seed=seed)]
        witnesses += [Witness(labels=c.labels, draws=c.draws, seed=seed) for c in others]
        proof = BatchProof(
            self._batch_pass, self._objective, seed, self._schedule.takes_second_draws, tuple(witnesses)
        )
        proof.begin()
        return proof

    def settle(
        self, proof: BatchProof | None, batch: Batch, samples: Sequence[Sample], losses: Tensor
    ) -> None:
        """Finish the proof of the pass that has just ended, or prove it after all if it showed news.

        Raises:
            CoverageError: what it found is not what autograd finds, and it was not forced.
        """
        found, called = self._found[batch.task], self._batch_pass.called
        found.batches += 1
        self._batches += 1
        try:
            if proof is None:
                if not self._schedule.has_news(called):
                    return
                proof = self._prepared([])
                losses = self._batch_pass.run(batch, [], witnesses=proof.witnesses)
            dtype = self._batch_pass.coarsest
            found.add(*proof.settle(batch, losses), dtype)
        except CoverageError as error:
            if not self._force:
                raise
            warnings.warn(f"going on by force: {error}", stacklevel=2)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # the weight gradients of an ordinary pass may not fit where ours does
            traceback.clear_frames(error.__traceback__)
            found.not_provable += 1
            release(self._batch_pass.device)
        self._schedule.proved(samples, called)
