"""What is checked once, before the gradients of a run are believed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from fisherscope.errors import CoupledSamplesError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.capture import Capture
from fisherscope.instrument.checks import check_independence, check_repetition
from fisherscope.instrument.coupling import first_coupled_module
from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions.base import Collector
from fisherscope.instrument.extensions.group_values import GroupValues
from fisherscope.instrument.memory import is_out_of_memory
from fisherscope.instrument.planning import RunPlan, TaskPlan
from fisherscope.store import SegmentWriter


def check_samples(run: RunPlan, tasks: Sequence[TaskPlan]) -> None:
    """A sample has the same gradient alone, beside a longer one, and once more after it.

    Args:
        run: the plan.
        tasks: those to choose the sample from.

    Raises:
        CoupledSamplesError: samples influence each other, and it was not forced.
    """
    # padding is what couples samples most often: take the planned batch with the most of it
    task, rows = max(((task, rows) for task in tasks for rows in task.batches), key=_padding)
    sample = f"{task.name}_{rows[-1]}"
    values = GroupValues(run.context)

    def squares(batch: Batch) -> Tensor:
        run.batch_pass.run(batch, [values])
        return values.square[0].double().cpu()

    single = run.batch(task, rows[-1:])
    alone, dtype = squares(single), run.batch_pass.coarsest
    pair = run.batch(task, (rows[-1], rows[0])) if len(rows) > 1 else None
    other = run.batch(task, task.batches[0][:1]) if pair is None else pair
    try:
        found = squares(other)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return  # where two do not fit, samples are run one by one
        raise
    try:
        if pair is not None:
            check_independence(alone, found, sample, dtype)
        check_repetition(alone, squares(single), sample, dtype)
    except CoupledSamplesError as error:
        where = first_coupled_module(run.batch_pass.model, run.objective, single, other)
        named = f"the first to give it another output is {where}" if where else "it is the loss that does so"
        if not run.options.force:
            raise CoupledSamplesError(f"{error} ({named})") from None
        warnings.warn(f"going on by force: {error} ({named})", stacklevel=2)


def _padding(choice: tuple[TaskPlan, Sequence[int]]) -> tuple[bool, int]:
    """Of the batch's shortest sample; batches are sorted by length."""
    task, rows = choice
    return len(rows) > 1, task.samples[rows[0]].length - task.samples[rows[-1]].length


def compute_error(run: RunPlan) -> dict[str, Tensor]:
    """How far rounding in the rules takes gradients from those of float32, on the run's first sample.

    Returns:
        ``compute/error``, one value per instrumented parameter: ``|g' - g| / |g|`` of that sample; nothing
        where the rules compute in float32 or wider.
    """
    if torch.finfo(run.batch_pass.dtype).eps <= torch.finfo(torch.float32).eps:
        return {}
    names = list(run.context.parameters)
    rough = Capture(names)
    first = run.batch(run.tasks[0], [0])
    run.batch_pass.run(first, [rough])
    errors = _Errors(rough.stacked())
    run.batch_pass.computing_in(torch.float32).run(first, [errors])
    return {
        "compute/error": torch.tensor(
            [errors.found[name] for name in names], dtype=torch.float32, device="cpu"
        )
    }


class _Errors(Collector):
    """Relative errors of gradients that were found before, one parameter at a time."""

    def __init__(self, rough: dict[str, Tensor]) -> None:
        self._rough = rough
        self.found: dict[str, float] = {}

    @override
    def wants_dense(self, parameter: str) -> bool:
        return True

    @override
    def update(self, emission: Emission, segment: SegmentWriter | None, start: int) -> None:
        del segment, start
        exact = emission.dense.detach().float().cpu()
        difference = (self._rough.pop(emission.parameter) - exact).norm()
        self.found[emission.parameter] = float(difference / exact.norm().clamp_min(1e-30))
