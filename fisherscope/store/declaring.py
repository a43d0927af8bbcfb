"""Declaring a task: new, as before, in another order, or with more samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fisherscope.errors import FingerprintError
from fisherscope.store import lifecycle
from fisherscope.store.disk import Durability
from fisherscope.store.keys import read_keys, write_keys
from fisherscope.store.ledger import Ledger, latest
from fisherscope.store.records import TaskRecord, task_name


@dataclass(frozen=True)
class Declared:
    """A task as the store knows it.

    Attributes:
        task: its record.
        order: for each row of the task the place of its sample in the data that was given.
    """

    task: TaskRecord
    order: tuple[int, ...]

    @property
    def extents(self) -> list[range]:
        """The rows that the task began with, and those that each extension added."""
        ends = [extent.n for extent in self.task.extents]
        return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def declare(
    root: Path, rank: int, name: str, keys: Sequence[str], ledgers: Sequence[Ledger], durability: Durability
) -> Declared:
    """Match samples with the rows of a task, and write the file of its keys where they are new.

    Args:
        root: of the store.
        rank: who declares it.
        name: of the task.
        keys: one per sample, in the order of the data.
        ledgers: of all ranks, read under the lock of the directory.
        durability: of the file.

    Raises:
        FingerprintError: the store's task has samples that are not among these.
        ValueError: the name or a key cannot be stored, or two samples have the same key.
    """
    tmp = f"{lifecycle.tmp_prefix(rank)}keys"
    if not any(name in ledger.tasks for ledger in ledgers):
        extent = write_keys(root, keys, durability, tmp)
        return Declared(TaskRecord(task_name(name), (extent,)), tuple(range(len(keys))))
    known = latest(name, ledgers)
    stored = read_keys(root, known.extents)
    place = {key: index for index, key in enumerate(keys)}
    if missing := [row for row, key in enumerate(stored) if key not in place]:
        raise FingerprintError(
            f"task {name!r} of {root}: {len(missing)} of its {known.n} samples ({name}_{missing[0]} is the "
            f"first) are not among the {len(keys)} given. Give all the samples that the store was begun with "
            "(a smaller max_samples leaves some out), in any order and with more if you like, or collect "
            "into another directory"
        )
    added = sorted(place.keys() - set(stored), key=place.__getitem__)
    rows = [*stored, *added]
    if len(place) != len(keys):
        write_keys(root, keys, durability, tmp)  # names the sample that is there twice
    extents = known.extents
    if added:
        extents = (*extents, write_keys(root, rows, durability, tmp))
    return Declared(TaskRecord(known.name, extents), tuple(place[key] for key in rows))
