"""The proof of one batch: watch our pass, run the ordinary one, compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fisherscope.errors import CoverageError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.checking.failure import explain, refuse_other_losses
from fisherscope.instrument.checking.gradient_hooks import ChangedGradients, watching_gradient_hooks
from fisherscope.instrument.checking.proof import (
    Comparison,
    Deviation,
    SquareComparison,
    Tolerance,
    backward_with,
    draw_weights,
    smallest_seen,
    worst,
)
from fisherscope.instrument.checking.witness import Witness
from fisherscope.instrument.label_sources import draws
from fisherscope.instrument.objectives import Objective, Predictions
from fisherscope.instrument.passes import BatchPass
from fisherscope.instrument.reference import tracked


@dataclass
class BatchProof:
    """Proves one batch: it watches our pass, and then runs the ordinary one.

    Attributes:
        batch_pass: runs batches.
        objective: the loss.
        seed: of weights and projections.
        second_draw: take two draws of weights, where few batches are proved.
        witnesses: what watches our pass; to be handed to it.
    """

    batch_pass: BatchPass
    objective: Objective
    seed: int
    second_draw: bool
    witnesses: tuple[Witness, ...]
    _random: list[Tensor] = field(default_factory=list)

    def begin(self) -> None:
        """Note the random state, in which the ordinary pass begins as well."""
        self._random = [torch.get_rng_state(), *_device_states()]

    def settle(self, batch: Batch, losses: Tensor) -> tuple[Deviation, float]:
        """Run the ordinary pass and compare.

        Args:
            batch: of our pass.
            losses: what our pass found, ``[n]``.

        Returns:
            The largest deviation, and the smallest relative error of one sample that would have been seen.

        Raises:
            CoverageError: what our pass found is not what autograd finds.
        """
        deviations: list[Deviation] = []
        tolerance = Tolerance.of(self.batch_pass.coarsest)
        data = next(w for w in self.witnesses if w.labels == "data")
        parameters = self.batch_pass.parameters
        with self._ordinary(batch) as (found, changed):
            own = found.losses(len(batch)) if isinstance(found, Predictions) else found
            refuse_other_losses(self.batch_pass.model, self.objective, batch, losses, own, tolerance)
            norms = data.norms()
            dtype = self.batch_pass.coarsest
            # one draw of signs does not see an exchange of two samples of equal sign
            for draw in range(1 + (self.second_draw or dtype == torch.float16)):
                weights = draw_weights(norms, self.seed + draw, dtype)
                deviations += self._compare(data, weights, own, tolerance)
            for place in dict.fromkeys((int(norms.argmin()), int(norms.argmax()))):
                squares = SquareComparison(data, place, tolerance)
                backward_with(own[place], parameters, squares.take)
                squares.finish()
                deviations += squares.deviations
            for witness in self.witnesses:
                if witness is not data and isinstance(found, Predictions):
                    deviations += self._compare_draw(witness, found, batch, tolerance)
            changed.refuse()
            largest = worst(deviations)
            if largest.excess > 1:
                raise CoverageError(explain(self.batch_pass, batch, own, data, deviations))
        return largest, smallest_seen(weights, norms, tolerance)

    def _compare(
        self, witness: Witness, weights: Tensor, losses: Tensor, tolerance: Tolerance
    ) -> list[Deviation]:
        comparison = Comparison(witness, self.batch_pass.parameters, weights, tolerance)
        weighted = (losses * weights.to(losses)).sum()
        backward_with(weighted, self.batch_pass.parameters, comparison.take)
        comparison.finish()
        return comparison.deviations

    def _compare_draw(
        self, witness: Witness, found: Predictions, batch: Batch, tolerance: Tolerance
    ) -> list[Deviation]:
        """The same for the one backward pass of another label source that was watched."""
        passes = draws(witness.labels, found, batch, count=witness.draws, seed=self.batch_pass.seed)
        for number, draw in enumerate(passes):
            if number == witness.draw:
                weights = draw_weights(witness.norms(), self.seed, self.batch_pass.coarsest)
                return self._compare(witness, weights, draw.losses, tolerance)
        return []

    @contextmanager
    def _ordinary(self, batch: Batch) -> Iterator[tuple[Predictions | Tensor, ChangedGradients]]:
        """A forward pass of which nothing of ours takes notice, from the same random state."""
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
        model = self.batch_pass.model
        with (
            torch.random.fork_rng(devices=list(devices)),
            tracked(self.batch_pass.parameters.values()),
            watching_gradient_hooks(model, tensors=True) as changed,
        ):
            torch.set_rng_state(self._random[0])
            for device, state in zip(devices, self._random[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield self.objective.run(model, batch), changed


def _device_states() -> list[Tensor]:
    return list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else []
