"""Which layers are given the same input, and whose gradients are sums over positions: seen in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from fisherscope.errors import FisherscopeError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.data import Sample
from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions.base import Collector
from fisherscope.instrument.extensions.factors import unsuitable
from fisherscope.instrument.memory import is_out_of_memory
from fisherscope.instrument.passes import BatchPass
from fisherscope.layout import ModelLayout
from fisherscope.store import SegmentWriter
from fisherscope.store.position_plan import side_of


@dataclass
class Seen(Collector):
    """What one batch tells of some weights of linear maps.

    Attributes:
        inputs: per weight what its layer is given, as a number that layers with the same input share.
        reasons: why the gradients of a weight cannot be kept by position; those that can be are absent.
    """

    layout: ModelLayout
    lengths: Mapping[str, Sequence[int]]
    inputs: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Note what these modules are given in the forward pass, by weight."""
        given: list[Tensor] = []  # alive as long as addresses are compared
        places: dict[tuple[object, ...], int] = {}

        def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(first, Tensor):
                given.append(first)
                self.inputs[name] = places.setdefault(_identity(first), len(places))

        with ExitStack() as stack:
            for name, module in modules.items():
                handle = module.register_forward_pre_hook(
                    lambda _module, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True
                )
                stack.callback(handle.remove)
            yield

    @override
    def update(self, emission: Emission, segment: SegmentWriter | None, start: int) -> None:
        del segment, start
        name = emission.parameter
        if name in self.inputs:
            is_target = side_of(self.layout, name) == "target"
            lengths = self.lengths["labels" if is_target else "positions"]
            if reason := unsuitable(emission.by_position, lengths, is_target=is_target):
                self.reasons[name] = reason


def two_short(tasks: Mapping[str, Sequence[Sample]]) -> tuple[str, list[int]]:
    """A task and two of its rows: the shortest, and the next that is longer, so that one is padded."""
    name, rows = min(tasks.items(), key=lambda task: min(_rank(sample) for sample in task[1]))
    order = sorted(range(len(rows)), key=lambda row: _rank(rows[row]))
    first = order[0]
    longer = [row for row in order[1:] if rows[row].cost != rows[first].cost] or order[1:]
    return name, [first, *longer[:1]]


def _rank(sample: Sample) -> tuple[bool, int]:
    """Samples without loss tell nothing."""
    return sample.tokens == 0, sample.cost


def look_at(
    batch_pass: BatchPass, layout: ModelLayout, batch: Batch, samples: Sequence[Sample], names: Sequence[str]
) -> Seen | None:
    """Run one batch and see what the linear maps with these weights are given.

    Args:
        batch_pass: to be called inside :func:`~fisherscope.instrument.prepared.prepared`.
        layout: of the model.
        batch: of a few samples.
        samples: those.
        names: the weights.

    Returns:
        None if the batch cannot be run. If memory does not suffice for it, gradients are stored as they are;
        for anything else there are checks of the run that say better what is wrong.
    """
    lengths = {"positions": [s.length for s in samples], "labels": [len(s.labels) for s in samples]}
    seen = Seen(layout, lengths)
    modules = batch_pass.linear_maps.modules
    try:
        with seen.watching({name: modules[name] for name in names}):
            batch_pass.run(batch, [seen])
    except FisherscopeError:
        return None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return seen


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are views of the same values in the same way."""
    storage = tensor.untyped_storage().data_ptr()
    place = (tensor.device, storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
    return (*place, tensor.dtype, tensor._version)
