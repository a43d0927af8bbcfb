"""An open store: what is committed, and the shards that are mapped."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from fisherscope.errors import CorruptStoreError, StoreError
from fisherscope.layout import GroupTable, ModelLayout
from fisherscope.store import memory
from fisherscope.store.gradient_plan import GradientPlan
from fisherscope.store.index import TaskIndex, build_index
from fisherscope.store.ledger import Ledger, read_ledgers
from fisherscope.store.lifecycle import store_path
from fisherscope.store.mapped import Checked, MappedShard
from fisherscope.store.schema import StoreHeader, read_header
from fisherscope.store.shard_record import ShardRecord

_OPEN_SHARDS = 128  # each map holds a file descriptor
_MOST_REPLACED = 200  # times in a row that what is read is replaced meanwhile

P = ParamSpec("P")
T = TypeVar("T")


class ReplacedError(StoreError):
    """A shard has been replaced by another since the store was opened."""


def following(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Have a method of a store read what a writer has put in place of what it was reading."""

    @functools.wraps(method)
    def run(store: OpenStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        for _ in range(_MOST_REPLACED):
            try:
                return method(store, *args, **kwargs)
            except ReplacedError:
                store.follow()
        return method(store, *args, **kwargs)

    return run


class OpenStore:
    """What readers of a store share. Picklable by its path; files are opened when they are needed.

    Attributes:
        path: the store's directory.
        header: what the store is a store of.
        memory_budget: bytes that one call for samples' values may take, result included.
    """

    path: Path
    header: StoreHeader

    def __init__(self, path: str | Path, memory_budget: int | str | None = None) -> None:
        self.path = store_path(path)
        self._asked = memory_budget
        self.memory_budget = memory.budget_of(memory_budget)
        self.refresh()

    def refresh(self) -> None:
        """Look again at what is committed.

        Raises:
            StoreFormatError: the directory is not a store, or one of another format version.
            CorruptStoreError: the journals or ``store.json`` are damaged.
        """
        self.header, digest = read_header(self.path)
        self._ledgers: list[Ledger] = read_ledgers(self.path, digest)
        self._index = build_index(self.path, self._ledgers)
        self._shards: OrderedDict[str, MappedShard] = OrderedDict()
        self._checked: dict[str, Checked] = {}
        self._token_texts: dict[int, str] | None = None

    def follow(self) -> None:
        """Look again at where the samples that are known lie, and at the aggregates.

        A run that goes on replaces aggregates, and whoever finalizes a store merges segments. Samples that
        were committed since stay unknown until :meth:`refresh`.
        """
        self._ledgers = read_ledgers(self.path, read_header(self.path)[1])
        now = build_index(self.path, self._ledgers)
        self._index = {name: now[name].limited_to(known) for name, known in self._index.items()}

    def __reduce__(self) -> tuple[type[Self], tuple[Path, int | str | None]]:
        return type(self), (self.path, self._asked)

    @property
    def layout(self) -> ModelLayout:
        """Where each head lives inside each parameter."""
        return self.header.layout

    @property
    def parameters(self) -> tuple[str, ...]:
        """The instrumented parameters."""
        return self.header.parameters

    @property
    def gradient_parameters(self) -> tuple[str, ...]:
        """The parameters whose per-sample gradients are stored."""
        return self.header.gradient_parameters

    @property
    def group_table(self) -> GroupTable:
        """The groups, in the order of :meth:`groups` and :meth:`group_values`."""
        return self.header.groups

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions, model name, dtype and device of the run that began the store."""
        return self.header.provenance

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order of declaration."""
        return list(self._index)

    def is_complete(self, task: str) -> bool:
        """Whether all samples of a task, and its aggregates, are committed."""
        return self._task(task).complete

    def n(self, task: str) -> int:
        """Number of samples of a task, committed or not."""
        return self._task(task).task.n

    def committed(self, task: str) -> int:
        """Number of committed samples of a task: all of them if it is complete."""
        return len(self._task(task))

    def shard(self, record: ShardRecord) -> MappedShard:
        """A shard, mapped; the last ones used stay open."""
        if record.file not in self._shards:
            checked = self._checked.setdefault(record.file, {})
            self._shards[record.file] = self._open_shard(record, checked)
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(record.file)
        return self._shards[record.file]

    @property
    def gradient_plan(self) -> GradientPlan:
        """Where the gradients of each parameter lie."""
        return self.header.gradients

    def task_index(self, task: str) -> TaskIndex:
        """Where each committed sample of a task lies."""
        return self._task(task)

    @property
    def ledgers(self) -> list[Ledger]:
        """The replayed journals, in order of rank."""
        return self._ledgers

    def _task(self, task: str) -> TaskIndex:
        try:
            return self._index[task]
        except KeyError:
            raise KeyError(f"{self.path} has no task {task!r}: it has {self.tasks}") from None

    def _open_shard(self, record: ShardRecord, checked: Checked) -> MappedShard:
        """Map a shard.

        Raises:
            ReplacedError: another has replaced it since the store was opened.
            CorruptStoreError: it is missing or damaged.
        """
        try:
            return MappedShard(self.path, record, checked)
        except CorruptStoreError:
            now = read_ledgers(self.path, read_header(self.path)[1])
            if record.file not in {shard.file for ledger in now for shard in ledger.shards()}:
                raise ReplacedError(
                    f"{record.file} of {self.path} has been replaced since the store was opened: call "
                    "store.refresh()"
                ) from None
            raise
