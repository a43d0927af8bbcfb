"""Tidying a store that is written: small shards become large ones, and the ranks' aggregates one.

Committed files are never touched. What takes their place is written beside them and committed by one line of
a journal, which names the files that it replaces; only then are those removed. A crash leaves the store as it
was before or as it is after.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fisherscope.errors import StoreError
from fisherscope.linalg import Moments
from fisherscope.store import journal
from fisherscope.store.aggregates import exponent_in, sums_in
from fisherscope.store.commits import Commits
from fisherscope.store.dtypes import to_raw
from fisherscope.store.ledger import latest
from fisherscope.store.lifecycle import store_path
from fisherscope.store.mapped import MappedShard
from fisherscope.store.names import unescape_path
from fisherscope.store.plan import SegmentPlan
from fisherscope.store.progressions import pack, unpack
from fisherscope.store.reader import ContributionStore, open_store
from fisherscope.store.records import SegmentRecord, SnapshotRecord
from fisherscope.store.schema import StoreHeader
from fisherscope.store.shard import ShardFile
from fisherscope.store.skeleton import DatasetSpec
from fisherscope.store.units import LOST, is_exponents
from fisherscope.torch_state import in_standard_state
from fisherscope.words import counted

SHARD_BYTES = 256 << 20
_PIECE = 16 << 20
_ALWAYS = {"sample", "ids", "labels", "types", "text", "positions", "groups"}


@dataclass(frozen=True)
class Finalized:
    """What was done.

    Attributes:
        shards: before and after.
        nbytes: of all shards before and after.
    """

    shards: tuple[int, int]
    nbytes: tuple[int, int]

    def __str__(self) -> str:
        (before, after), (large, small) = self.shards, self.nbytes
        return f"{counted(before, 'shard')} of {large:,} bytes became {after:,} of {small:,} bytes"


@in_standard_state
def finalize(path: str | Path) -> Finalized:
    """Merge small shards of each task into shards of up to 256 MiB, and the ranks' aggregates into one.

    Every value that a reader gives stays the same, bit for bit. The store may be resumed and extended
    afterwards.

    Args:
        path: the directory of the store.

    Raises:
        StoreLockedError: a collection writes to it.
        StoreFullError: the disk cannot hold a merged shard beside the ones it replaces; those stay.
        CorruptStoreError: something that is to be merged is damaged; it stays as it is.
    """
    root = store_path(path)
    before = _sizes(open_store(root))
    header = open_store(root).header
    with ExitStack() as stack:
        ranks = []
        for rank in journal.ranks(root):
            # what is removed then was committed to survive anything, and so must be what replaces it
            ranks.append(Commits.open(root, header, rank=rank, durability="power"))
            stack.callback(ranks[-1].close)
        for commits in ranks:
            commits.refresh()  # nobody writes any more
        for commits in ranks:
            for segments in list(commits.ledger.segments.values()):
                for group in _groups(list(segments.values())):
                    _merge_segments(commits, group)
        for task in dict.fromkeys(task for commits in ranks for task in commits.ledger.tasks):
            _merge_snapshots(ranks[0], task)
    after = _sizes(open_store(root))
    return Finalized((before[0], after[0]), (before[1], after[1]))


def _sizes(store: ContributionStore) -> tuple[int, int]:
    sizes = [shard.nbytes for ledger in store.ledgers for shard in ledger.shards()]
    return len(sizes), sum(sizes)


def _groups(segments: Sequence[SegmentRecord]) -> Iterator[list[SegmentRecord]]:
    """Segments that go into one shard, in the order in which they were committed: two of them at least."""
    kinds: dict[tuple[str, ...], list[SegmentRecord]] = {}
    for segment in segments:
        if segment.shard.nbytes <= SHARD_BYTES // 2:
            kinds.setdefault(tuple(sorted(d.name for d in segment.shard.datasets)), []).append(segment)
    for same in kinds.values():
        group: list[SegmentRecord] = []
        for segment in same:
            if sum(s.shard.nbytes for s in (*group, segment)) > SHARD_BYTES:
                if len(group) > 1:
                    yield group
                group = []
            group.append(segment)
        if len(group) > 1:
            yield group


def _merge_segments(commits: Commits, group: Sequence[SegmentRecord]) -> None:
    parts = [MappedShard(commits.path, segment.shard) for segment in group]
    rows = tuple(row for segment in group for row in segment.rows)
    files = tuple(segment.shard.file for segment in group)
    task = group[0].task
    names = {dataset.name for dataset in group[0].shard.datasets}
    plan = _merged_plan(commits.header, parts, names, len(rows))
    if plan.specs.keys() != names:
        raise StoreError(
            f"{parts[0].path} does not hold the datasets of this store's segments: finalize leaves it alone"
        )
    shard = commits.new_shard("segment", list(plan.specs.values()), task)
    try:
        for name in plan.specs:
            if name.endswith("/offsets"):
                shard.write(name, to_raw(plan.offsets[name.removesuffix("/offsets")], "int64"))
            else:
                _copy(shard, plan, name, parts)
    except BaseException:
        shard.discard()
        raise
    commits.commit(shard, lambda s: SegmentRecord(task, rows, s, files))
    commits.remove(files)


def _merged_plan(
    header: StoreHeader, parts: Sequence[MappedShard], names: Collection[str], n: int
) -> SegmentPlan:
    """The plan of a segment with the samples of all parts."""
    lengths = {
        name.removesuffix("/offsets"): [
            length for part in parts for length in np.diff(part.tensor(name).numpy()).tolist()
        ]
        for name in names
        if name.endswith("/offsets")
    }
    with_gradients = any(name.split("/")[0] not in _ALWAYS for name in names)
    return SegmentPlan.build(header, n, lengths, gradients=with_gradients)


def _copy(shard: ShardFile, plan: SegmentPlan, name: str, parts: Sequence[MappedShard]) -> None:
    """Write one dataset: the samples of the parts one after the other, head by head where there are heads."""
    spec = plan.specs[name]
    spans = spec.shape[0] if name in plan.head_major else 1
    span_bytes = spec.nbytes // spans
    start = 0
    for part in parts:
        mine = part.dataset(name).spec
        part.check(name)
        flat = part.view(name, mine.shape, mine.dtype).reshape(spans, -1).view(np.uint8)
        for span, values in enumerate(flat):
            for done in range(0, len(values), _PIECE):
                shard.write(name, values[done : done + _PIECE], span * span_bytes + start + done)
        start += flat.shape[1]


def _merge_snapshots(commits: Commits, task: str) -> None:
    """Put the aggregates of all ranks into one of this rank."""
    live = [ledger.snapshots[task] for ledger in commits.ledgers if task in ledger.snapshots]
    if len(live) < 2:
        return
    widest = latest(task, commits.ledgers)
    if commits.ledger.tasks.get(task) != widest:
        commits.append(widest)
    own = commits.ledger.snapshots.get(task)
    files = tuple(record.shard.file for record in live)
    others = tuple(file for file in files if own is None or file != own.shard.file)
    batches = pack(int(batch) for record in live for batch in unpack(record.batches))
    count = sum(record.count for record in live)
    shard = _merged([MappedShard(commits.path, record.shard) for record in live], live, commits, task)
    commits.commit(shard, lambda s: SnapshotRecord(task, batches, count, s, others))
    commits.remove(files)


def _merged(
    parts: Sequence[MappedShard], live: Sequence[SnapshotRecord], commits: Commits, task: str
) -> ShardFile:
    """A shard with the sums of all parts, as readers add them up; one array at a time is in memory.

    Sums are kept in float64, so that what readers give stays the same, bit for bit. What rounding took from
    them needs no array of its own then.
    """
    # what a rank lacks nobody may read, and so it stays
    specs = {
        d.name: DatasetSpec(d.name, d.spec.shape, "int64" if d.spec.dtype == "int64" else "float64")
        for d in live[0].shard.datasets
        if all(d.name in part and part.dataset(d.name).spec.shape == d.spec.shape for part in parts)
        and not unescape_path(d.name).startswith(f"{LOST}/")
    }
    shard = commits.new_shard("snapshot", list(specs.values()), task)
    try:
        for name, spec in specs.items():
            shard.write(name, to_raw(_merged_array(parts, name, commits.header, specs), spec.dtype))
    except BaseException:
        shard.discard()
        raise
    return shard


def _merged_array(
    parts: Sequence[MappedShard], escaped: str, header: StoreHeader, specs: Mapping[str, DatasetSpec]
) -> Tensor:
    prefix, _, part_name = escaped.rpartition("/")
    if {f"{prefix}/{p}" for p in ("count", "mean", "m2")} <= specs.keys():
        return _merged_moments(parts, prefix)[part_name]
    name = unescape_path(escaped)
    if is_exponents(name):
        return torch.stack([part.tensor(escaped) for part in parts]).amin(0)
    if specs[escaped].dtype == "int64":
        return torch.stack([part.tensor(escaped) for part in parts]).sum(0)
    values = sums_in(header, parts[0], name)
    for part in parts[1:]:
        values += sums_in(header, part, name)
    exponent = min(exponent_in(header, part, name) for part in parts)
    return values * 2.0**exponent if exponent else values


def _merged_moments(parts: Sequence[MappedShard], prefix: str) -> dict[str, Tensor]:
    """Count, mean and m2 of all parts together."""
    merged: Moments | None = None
    for part in parts:
        count, mean, m2 = (part.tensor(f"{prefix}/{name}").numpy() for name in ("count", "mean", "m2"))
        moments = Moments(int(count[0]), mean, m2)
        merged = moments if merged is None else merged.merge(moments)
    assert merged is not None
    return {
        "count": torch.tensor([merged.count], dtype=torch.int64, device="cpu"),
        "mean": torch.from_numpy(merged.mean),
        "m2": torch.from_numpy(merged.m2),
    }
