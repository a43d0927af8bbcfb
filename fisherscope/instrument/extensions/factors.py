"""Factors of gradients on their way to the store: without padding, and a shared input once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherscope.errors import CoverageError
from fisherscope.instrument.by_position import ByPosition, NotByPosition
from fisherscope.instrument.emission import Emission
from fisherscope.store import SegmentWriter
from fisherscope.store.encodings import Encodings


class FactorWriter:
    """Writes the factors of one batch after the other.

    Which parameters share an input was found before the run; here every batch is held to it.
    """

    def __init__(self, encodings: Encodings) -> None:
        """Write factors in these encodings."""
        self._encodings = encodings
        self._sharing: dict[str, list[str]] = {}
        for name, shared in encodings.inputs.items():
            self._sharing.setdefault(shared, []).append(name)
        self.begin(0)

    def begin(self, n: int) -> None:
        """A batch of ``n`` samples begins."""
        self._n = n
        self._awaited = {shared: set(names) for shared, names in self._sharing.items()}
        self._written: set[str] = set()
        self._inputs: dict[str, Tensor] = {}  # written, and to be compared with what is still awaited

    def write(self, emission: Emission, segment: SegmentWriter, start: int) -> None:
        """Write the factors of one parameter.

        Raises:
            CoverageError: its gradients are not what the store was laid out for.
        """
        name, writer, found = emission.parameter, segment.gradients, emission.by_position
        place, shared = writer.factored(name), self._encodings.inputs[name]
        lengths = writer.lengths(name, start, self._n)
        self._awaited[shared].discard(name)
        if isinstance(found, ByPosition):
            kept = kept_terms(found, lengths, is_target=place.input.family == "labels")
            if isinstance(kept, str):
                raise refusal(name, kept)
            writer.put_output(name, start, found.output_gradients[kept])
            self._write_input(name, found.inputs, kept, segment, start)
        elif not emission.is_zero:
            raise refusal(name, found.reason)
        else:
            # the loss does not depend on it: whatever it was given, times nothing
            writer.put_output(
                name,
                start,
                torch.zeros(sum(lengths), place.output.columns, dtype=torch.float32, device="cpu"),
            )
        if not self._awaited[shared]:
            self._inputs.pop(shared, None)

    def _write_input(
        self, name: str, inputs: Tensor, kept: Tensor, segment: SegmentWriter, start: int
    ) -> None:
        shared = self._encodings.inputs[name]
        if shared not in self._written:
            segment.gradients.put_input(shared, start, inputs[kept])
            self._written.add(shared)
            self._inputs[shared] = inputs
        elif not is_same(self._inputs[shared], inputs):
            raise refusal(name, f"its layer is no longer given what that of {shared} is given")

    def end(self, segment: SegmentWriter, start: int) -> None:
        """The batch has ended: an input that no gradient needs is zero."""
        for shared in self._sharing.keys() - self._written:
            rows = sum(segment.gradients.lengths(shared, start, self._n))
            columns = segment.gradients.factored(shared).input.columns
            segment.gradients.put_input(
                shared, start, torch.zeros(rows, columns, dtype=torch.float32, device="cpu")
            )
        self._inputs.clear()


def kept_terms(found: ByPosition, lengths: Sequence[int], *, is_target: bool) -> Tensor | str:
    """Which terms of a gradient are a sample's positions, or why it cannot be kept by position.

    Args:
        found: the gradient by position.
        lengths: positions of each sample, as the store counts them.
        is_target: whether they are those of labels: what stands behind the last one that bears loss is there,
            too, and contributes nothing.

    Returns:
        ``[n, T]`` bool, with ``lengths[i]`` positions of sample i.
    """
    if found.uses != 1:
        return f"its layer is called {found.uses} times for a sample"
    wanted = torch.tensor(lengths, device=found.attended.device, dtype=torch.int64).unsqueeze(1)
    kept = found.attended
    if is_target:
        kept = torch.arange(kept.shape[1], device=kept.device, dtype=torch.int64) < wanted
    if (kept.sum(1, keepdim=True) != wanted).any() or (found.attended & ~kept).any():
        return "its layer sees other positions than the sample has"
    beyond = found.output_gradients[~kept]
    # what overflows does so everywhere, and is told of the sample when the batch has ended
    if beyond[torch.isfinite(beyond)].any():
        return "padding has a part in it"
    return kept


def is_same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same values: most often they are the same tensor."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.data_ptr() == second.data_ptr() and first.stride() == second.stride():
        return True
    return torch.equal(first, second)


def refusal(parameter: str, reason: str) -> CoverageError:
    """What to raise where factors turn out not to be possible in the middle of a run."""
    return CoverageError(
        f"the gradients of {parameter} cannot be stored as factors: {reason}. Collect into a new directory "
        'with SampleGradients(encoding="dense")'
    )


def unsuitable(found: ByPosition | NotByPosition, lengths: Sequence[int], *, is_target: bool) -> str | None:
    """Why a gradient cannot be kept by position, or None."""
    if isinstance(found, NotByPosition):
        return found.reason
    kept = kept_terms(found, lengths, is_target=is_target)
    return kept if isinstance(kept, str) else None
