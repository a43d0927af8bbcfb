"""A store knows its model by what it computes: losses and gradient norms of three of its samples.

Digests of weights say quickly that something is another, and lists of what might matter (adapters, hooks,
buffers, scales) are never complete. What was collected must be what this model computes: that is compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fisherscope.errors import FingerprintError, NonFiniteError, NotStoredError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.checking.environment import differences, environment, surroundings
from fisherscope.instrument.data import Sample
from fisherscope.instrument.extensions.base import Context
from fisherscope.instrument.extensions.group_values import GroupValues
from fisherscope.instrument.memory import is_out_of_memory, release
from fisherscope.instrument.model_facts import ModelFacts
from fisherscope.instrument.passes import BatchPass
from fisherscope.store import ContributionStore, StoreWriter

if TYPE_CHECKING:
    from fisherscope.instrument.planning import TaskPlan

SAME = 1e-6
"""The largest relative difference of group norms in the same environment."""

_ELSEWHERE = 10.0  # times the measured rounding
_LEAST_ELSEWHERE = 1e-5
_FLOOR = 1e-3  # of the largest group: below it rounding is a large part of a value
_SHOWN = 3


@dataclass(frozen=True)
class Measured:
    """What a model makes of some samples.

    Attributes:
        norms: of each group's gradient, ``[samples, groups]`` float64.
        losses: ``[samples]`` float64.
    """

    norms: Tensor
    losses: Tensor

    def difference(self, other: Measured) -> Tensor:
        """Relative differences of norms, ``[samples, groups]``, and of losses behind them."""
        larger = torch.maximum(self.norms, other.norms)
        floor = _FLOOR * larger.max(1, keepdim=True).values + 1e-300
        norms = (self.norms - other.norms).abs() / (larger + floor)
        losses = (self.losses - other.losses).abs() / (self.losses.abs() + other.losses.abs() + 1e-300)
        return torch.cat([norms, losses.unsqueeze(1)], 1).nan_to_num(nan=torch.inf)


@dataclass(frozen=True)
class Prober:
    """Runs samples of a store through a model.

    Attributes:
        facts: of the model.
        batch_pass: runs batches.
        context: of the run.
        make: a batch of some samples.
    """

    facts: ModelFacts
    batch_pass: BatchPass
    context: Context
    make: Callable[[Sequence[Sample]], Batch]

    def measure(self, samples: Sequence[Sample]) -> Measured:
        """One sample at a time."""
        return _joined([self._of_batch([sample]) for sample in samples])

    def _of_batch(self, samples: Sequence[Sample]) -> Measured:
        values = GroupValues(self.context)
        losses = self.batch_pass.run(self.make(samples), [values])
        return Measured(values.square.double().cpu().sqrt(), losses.double().cpu())

    def record(self, writer: StoreWriter, samples: Mapping[str, Sample]) -> dict[str, Tensor]:
        """Measure chosen samples of a new store, alone and together, and say what came of it.

        Args:
            writer: of the store; what can be read goes into its evidence.
            samples: by id.

        Returns:
            ``probe/norms`` and ``probe/losses``, to be kept with the store.
        """
        rows = list(samples.values())
        try:
            alone = self.measure(rows)
        except NonFiniteError:
            return {}  # the run will say which sample, and where
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            release(self.context.device)  # likewise
            return {}
        if not bool(torch.isfinite(alone.norms).all()):
            return {}
        once_more = Measured(alone.norms[-1:], alone.losses[-1:])
        repeats = not bool((self.measure(rows[-1:]).difference(once_more) > SAME).any())
        rounding = self._rounding(rows, alone)
        elsewhere = max(_LEAST_ELSEWHERE, _ELSEWHERE * rounding)
        writer.evidence(
            "probe",
            {
                "samples": list(samples),
                "keys": [sample.key for sample in rows],
                "environment": environment(self.facts),
                "surroundings": surroundings(self.facts.model),
                "repeats": repeats,
                "rounding": rounding,
                "tolerance": SAME,
                "tolerance_elsewhere": elsewhere,
                "dtype": str(self.batch_pass.coarsest).removeprefix("torch."),
            },
        )
        return {"probe/norms": alone.norms, "probe/losses": alone.losses}

    def _rounding(self, rows: Sequence[Sample], alone: Measured) -> float:
        """How much padding and company change the same samples: by rounding."""
        try:
            return float(self._of_batch(rows).difference(alone).max())
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            release(self.context.device)
            return 0.0

    def compare(
        self,
        store: ContributionStore,
        given: Mapping[str, Sample],
        stored: Callable[[Sequence[tuple[str, int]]], Sequence[Sample]],
    ) -> dict[str, Any] | None:
        """Have the model compute the store's probe again.

        Args:
            store: the store.
            given: samples that are at hand, by key.
            stored: gives samples of the store, by task and row.

        Returns:
            What there is to note beside the identity; None where nothing was compared.

        Raises:
            FingerprintError: the model computes something else.
        """
        recorded = store.evidence("probe")
        arrays = store.constants() if recorded else {}
        if not recorded or "probe/norms" not in arrays:
            return None
        probe, now = recorded[-1], environment(self.facts)
        before = Measured(*(torch.from_numpy(arrays[f"probe/{k}"]).clone() for k in ("norms", "losses")))
        if not probe["repeats"]:
            return {"compared": False, "because": "the objective does not repeat itself: digests decide"}
        try:
            samples = self._samples(probe, given, stored)
        except (NotStoredError, KeyError):
            because = "its samples are neither given nor stored: digests decide; pass tasks= with all tasks"
            return {"compared": False, "because": because}
        moved = differences(probe["environment"], now)
        limit = float(probe["tolerance_elsewhere"] if moved else probe["tolerance"])
        found = self.measure(samples)
        difference = found.difference(before)
        if float(difference.max()) > limit:
            raise FingerprintError(self._refusal(store, probe, difference, moved, limit))
        note: dict[str, Any] = {"compared": True, "largest": float(difference.max()), "tolerance": limit}
        return note | ({"environment": moved, "bit_identical": False} if moved else {})

    def _samples(
        self,
        probe: Mapping[str, Any],
        given: Mapping[str, Sample],
        stored: Callable[[Sequence[tuple[str, int]]], Sequence[Sample]],
    ) -> list[Sample]:
        found = []
        for name, key in zip(probe["samples"], probe["keys"], strict=True):
            task, _, row = str(name).rpartition("_")
            found.append(given[key] if key in given else stored([(task, int(row))])[0])
        return found

    def _refusal(
        self,
        store: ContributionStore,
        probe: Mapping[str, Any],
        difference: Tensor,
        moved: Sequence[str],
        limit: float,
    ) -> str:
        sample = int(difference.max(1).values.argmax())
        worst, place = difference[sample].max(0)
        groups = store.header.groups.groups
        parameter = groups[int(place)].parameter if int(place) < len(groups) else "the loss"
        hints = differences(probe["surroundings"], surroundings(self.facts.model))
        said = "; ".join(hints[:_SHOWN]) + (f"; {len(hints) - _SHOWN} more" if len(hints) > _SHOWN else "")
        return (
            f"{store.path} was collected from a model that computes something else: with the same weights, "
            f"the gradient of {probe['samples'][sample]} with respect to {parameter} has another norm, by "
            f"{float(worst):.2%}, and {limit:.1g} would be rounding. "
            + (f"What is different: {said}. " if hints else "")
            + (f"The environment is another, too: {'; '.join(moved)}. " if moved else "")
            + ("" if hints else "Usual causes: hooks, adapters, buffers, autocast, or the objective. ")
            + "Restore the model as it was, or collect into another directory"
        )


def _joined(parts: Sequence[Measured]) -> Measured:
    return Measured(torch.cat([p.norms for p in parts]), torch.cat([p.losses for p in parts]))


def probe_samples(tasks: Sequence[TaskPlan], seed: int) -> dict[str, Sample]:
    """The longest sample, the shortest and one between, by id."""
    every = {f"{task.name}_{row}": sample for task in tasks for row, sample in enumerate(task.samples)}
    order = sorted(every, key=lambda name: every[name].cost)
    draw = int.from_bytes(hashlib.sha256(f"probe {seed}".encode()).digest()[:4], "little")
    chosen = (order[-1], order[0], order[draw % len(order)])
    return {name: every[name] for name in dict.fromkeys(chosen)}
