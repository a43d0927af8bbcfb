"""Tidying a store that is written: small shards become large ones, and the ranks' aggregates one.

Committed files are never touched. What takes their place is written beside them and committed by one line of
a journal, which names the files that it replaces; only then are those removed. A crash leaves the store as it
was before or as it is after.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fisherscope.errors import StoreError
from fisherscope.linalg import Moments
from fisherscope.store import journal
from fisherscope.store.commits import Commits
from fisherscope.store.disk import Durability
from fisherscope.store.dtypes import to_raw
from fisherscope.store.mapped import MappedShard
from fisherscope.store.plan import SegmentPlan
from fisherscope.store.progressions import pack
from fisherscope.store.reader import ContributionStore, open_store
from fisherscope.store.records import SegmentRecord, SnapshotRecord
from fisherscope.store.schema import StoreHeader
from fisherscope.store.shard import ShardFile
from fisherscope.store.snapshot import Snapshot, read_snapshot, write_arrays

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
        return f"{before} shards of {large:,} bytes became {after} of {small:,} bytes"


def finalize(path: str | Path, *, durability: Durability = "power") -> Finalized:
    """Merge small shards of each task into shards of up to 256 MiB, and the ranks' aggregates into one.

    Every value that a reader gives stays the same, bit for bit. The store may be resumed and extended
    afterwards.

    Args:
        path: the directory of the store.
        durability: of the commits.

    Raises:
        StoreLockedError: a collection writes to it.
        StoreFullError: the disk cannot hold a merged shard beside the ones it replaces; those stay.
        CorruptStoreError: something that is to be merged is damaged; it stays as it is.
    """
    root = Path(path)
    before = _sizes(open_store(root))
    header = open_store(root).header
    with ExitStack() as stack:
        ranks = []
        for rank in journal.ranks(root):
            ranks.append(Commits.open(root, header, rank=rank, durability=durability))
            stack.callback(ranks[-1].close)
        for commits in ranks:
            for segments in list(commits.ledger.segments.values()):
                for group in _groups(list(segments.values())):
                    _merge_segments(commits, group)
        first = ranks[0]
        for task in first.ledger.tasks:
            live = [ledger.snapshots[task] for ledger in first.ledgers if task in ledger.snapshots]
            if len(live) > 1:
                _merge_snapshots(first, task, live)
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


def _merge_snapshots(commits: Commits, task: str, live: Sequence[SnapshotRecord]) -> None:
    snapshots = [read_snapshot(commits.path, record) for record in live]
    batches = pack(batch for snapshot in snapshots for batch in snapshot.batches)
    count = sum(snapshot.count for snapshot in snapshots)
    files = tuple(record.shard.file for record in live)
    own = commits.ledger.snapshots.get(task)
    others = tuple(file for file in files if own is None or file != own.shard.file)
    arrays = _merged(snapshots)
    shard = write_arrays(arrays, lambda specs: commits.new_shard("snapshot", specs, task))
    commits.commit(shard, lambda s: SnapshotRecord(task, batches, count, s, others))
    commits.remove(files)


def _merged(snapshots: Sequence[Snapshot]) -> dict[str, Tensor]:
    """The sums of all, as readers add them up."""
    # what a rank lacks nobody may read, and so it stays
    names = [name for name in snapshots[0].arrays if all(name in other.arrays for other in snapshots)]
    merged: dict[str, Tensor] = {}
    for name in names:
        if name.startswith("moments/"):
            if name.endswith("/count"):
                merged |= _merged_moments(snapshots, name.removesuffix("/count"))
            continue
        total: Tensor | None = None
        for snapshot in snapshots:
            # in the order and the precision of readers, which so find the very same sums
            values = snapshot.arrays[name]
            wide = values.double() if values.is_floating_point() else values
            total = wide if total is None else total + wide
        assert total is not None
        merged[name] = total
    return merged


def _merged_moments(snapshots: Sequence[Snapshot], prefix: str) -> dict[str, Tensor]:
    merged: Moments | None = None
    for snapshot in snapshots:
        count, mean, m2 = (snapshot.arrays[f"{prefix}/{part}"].numpy() for part in ("count", "mean", "m2"))
        moments = Moments(int(count[0]), mean, m2)
        merged = moments if merged is None else merged.merge(moments)
    assert merged is not None
    return {
        f"{prefix}/count": torch.tensor([merged.count]),
        f"{prefix}/mean": torch.from_numpy(merged.mean),
        f"{prefix}/m2": torch.from_numpy(merged.m2),
    }
