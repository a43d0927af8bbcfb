"""Where the gradients of a sample come from position by position: the store, or the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fisherscope.analyses.slices import Block
from fisherscope.errors import NotStoredError, UsageError
from fisherscope.layout.attention import role_of
from fisherscope.linalg import Factored
from fisherscope.store import ContributionStore
from fisherscope.store.position_plan import Side, side_of

Factors = Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]
"""Per sample id and parameter what ``Scope.factors`` gives: ``(a [T, in], d [T, out])``."""

# whose labels stand beside their own positions, and not behind the position that predicts them
_BESIDE = frozenset({"masked_lm", "token_classification"})
# whose labels are those of the sample, at none of its positions
_WHOLE = frozenset({"sequence_classification", "image_classification"})


@dataclass(frozen=True)
class Sample:
    """One sample of a store.

    Attributes:
        id: such as "math_7".
        task, row: whose it is.
        place: in the table of the task's samples.
    """

    id: str
    task: str
    row: int
    place: int

    @classmethod
    def find(cls, store: ContributionStore, name: str) -> Sample:
        """The sample of that id.

        Raises:
            KeyError: there is none.
        """
        task, _, row = name.rpartition("_")
        if task in store.tasks and row.isdecimal():
            places = np.flatnonzero(store.task_index(task).rows == int(row))
            if len(places):
                return cls(name, task, int(row), int(places[0]))
        raise KeyError(
            f"{store.path} has no sample {name!r}: ids look like 'math_7', tasks are {store.tasks}"
        )


@dataclass(frozen=True)
class Tokens:
    """What stands at the positions of a sample.

    Attributes:
        ids: ``[T]`` int64; -1 where there is no token, as in an image.
        texts: how they read; None where that is not stored.
        bears_loss: whether the position predicts a label that bears loss, ``[T]`` bool.
    """

    ids: NDArray[np.int64]
    texts: list[str | None]
    bears_loss: NDArray[np.bool_]

    @classmethod
    def of(cls, store: ContributionStore, sample: Sample, side: Side) -> Tokens:
        """Of the input, or of the target of an encoder-decoder, whose tokens are the labels."""
        ids, labels = store.token_ids(sample.task, sample.row)
        counted = labels != -100
        if side == "target":
            shown, bears_loss = np.where(counted, labels, -1), counted
        else:
            facts = store.samples(sample.task).iloc[sample.place]
            shown = ids if len(ids) else np.full(int(facts["length"]), -1)
            bears_loss = np.zeros(len(shown), dtype=bool)
            objective = store.header.fingerprint.get("objective")
            if len(labels) == len(shown) and objective not in _WHOLE:
                # a loss of the user's own has any name, but so many labels as it counts
                is_beside = objective in _BESIDE or facts["tokens"] != counted[1:].sum()
                ahead = 0 if is_beside else 1
                bears_loss[: len(shown) - ahead] = counted[ahead:]
        return cls(shown.astype(np.int64), store.token_texts(shown.tolist()), bears_loss)


class FactorSource:
    """Factors of the gradients of single samples.

    Attributes:
        given: some that were computed with the model; they go before those of the store.
        used: where what was read came from, "store" and "model".
    """

    def __init__(self, store: ContributionStore, given: Factors | None) -> None:
        self._store = store
        self.given = {} if given is None else given
        self.used: set[str] = set()
        self._held: dict[str, tuple[str, tuple[Tensor, Tensor]]] = {}

    def read(self, sample: Sample, block: Block, positions: int) -> tuple[Tensor, Tensor]:
        """Factors of axis 0 and of axis 1 of a block's parameter, ``[T, R]`` and ``[T, C]`` float32.

        Raises:
            NotStoredError: there are none.
            ValueError: those that were given are not of this sample and parameter.
        """
        parameter = block.partition.parameter
        name, found = self._held.get(sample.id, ("", None))
        if name != parameter or found is None:  # Q, K and V may be parts of one parameter
            found = self._given(sample, block)
            self.used.add("store" if found is None else "model")
            found = self._stored(sample, parameter) if found is None else found
            self._held[sample.id] = parameter, found
        left, right = found
        shapes = (tuple(left.shape), tuple(right.shape))
        rows, columns = block.partition.shape
        if shapes != ((positions, rows), (positions, columns)):
            raise UsageError(
                f"the factors of {parameter} of {sample.id} have shapes {shapes}, and the sample has "
                f"{positions} positions and the parameter shape {(rows, columns)}: pass what "
                f"scope.factors(store, [{sample.id!r}]) returns"
            )
        return left, right

    def _given(self, sample: Sample, block: Block) -> tuple[Tensor, Tensor] | None:
        found = self.given.get(sample.id, {}).get(block.partition.parameter)
        if found is None:
            return None
        inputs, outputs = (side.float() for side in found)
        # heads of O are cut along its input features, those of all others along their output features
        output_axis = block.partition.axis ^ (role_of(block.name) == "O")
        return (outputs, inputs) if output_axis == 0 else (inputs, outputs)

    def _stored(self, sample: Sample, parameter: str) -> tuple[Tensor, Tensor]:
        is_there = parameter in self._store.gradient_parameters
        if not is_there or self._store.encoding(parameter) != "factored":
            raise self._missing(sample, parameter, f"{self._store.path} does not hold them by position")
        try:
            found = self._store.per_sample(sample.task, parameter, [sample.place])
        except NotStoredError:
            raise self._missing(sample, parameter, "those of this sample were left out") from None
        assert isinstance(found, Factored)
        return found.left[0], found.right[0]

    def _missing(self, sample: Sample, parameter: str, why: str) -> NotStoredError:
        return NotStoredError(
            f"no gradients of {parameter} of sample {sample.id} position by position: {why}. Collect with "
            'SampleGradients(encoding="factored"), or pass factors=scope.factors(store, '
            f"[{sample.id!r}, ...])"
        )


def chosen_blocks(
    store: ContributionStore, layer: int | None, block: str | None, stack: str | None
) -> list[Block]:
    """The attention weights that are asked for: of those whose gradients are stored, if any are.

    Raises:
        KeyError: there are none.
    """
    instrumented = [
        Block(attention, found.name, "weight", found.weight)
        for attention, found in store.layout.head_blocks()
        if found.weight.parameter in store.parameters and len(found.weight.shape) == 2
    ]
    asked = (layer, block, stack)
    wanted = [
        b
        for b in instrumented
        if all(
            wish in (None, own)
            for wish, own in zip(asked, (b.attention.layer, b.name, b.attention.stack), strict=True)
        )
    ]
    if not wanted:
        known = sorted({(b.attention.stack, b.attention.layer, b.name) for b in instrumented})
        raise KeyError(f"no weights of layer={layer!r}, block={block!r}, stack={stack!r}: there are {known}")
    return [b for b in wanted if b.partition.parameter in store.gradient_parameters] or wanted


def shared_side(store: ContributionStore, blocks: list[Block]) -> Side:
    """Whose positions these weights see.

    Raises:
        ValueError: not all see the same ones.
    """
    sides = {side_of(store.layout, block.partition.parameter) for block in blocks}
    (side, *others) = sides
    if others or side is None:
        raise UsageError(
            "some of these weights see the positions of the input, others those of the target: choose by "
            'stack="encoder" or stack="decoder", or one block of the cross attention'
        )
    return side
