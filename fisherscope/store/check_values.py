"""Values in a shard that contradict the journal, the header, or each other: no checksum shows these."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fisherscope.errors import CorruptStoreError
from fisherscope.store import disk
from fisherscope.store.check_aggregates import aggregate_problems
from fisherscope.store.check_shard import ShardCheck
from fisherscope.store.plan import RAGGED, SegmentPlan
from fisherscope.store.records import ConstantsRecord, SegmentRecord, SnapshotRecord
from fisherscope.store.schema import SHARD_DIRECTORY, StoreHeader
from fisherscope.store.shard_record import DatasetRecord
from fisherscope.store.skeleton import DatasetSpec
from fisherscope.store.verification import Finding

_OFFSETS = "/offsets"
_COUNT = DatasetSpec("moments/count", (1,), "int64")

Known: TypeAlias = dict[str, DatasetRecord]
Problems: TypeAlias = Iterator[tuple[str, str]]


def check_values(
    root: Path,
    record: SegmentRecord | SnapshotRecord | ConstantsRecord,
    header: StoreHeader | None,
    check: ShardCheck,
) -> list[Finding]:
    """Compare what a shard holds with what is said of it elsewhere.

    Args:
        root: of the store.
        record: that commits the shard.
        header: of the store, if it can be read.
        check: of the shard's bytes; damaged datasets are left out.
    """
    shard = record.shard
    try:
        known = {d.name: d for d in shard.datasets if d.name not in check.damaged}
    except CorruptStoreError:  # a finding already
        return []
    if not isinstance(record, SegmentRecord):
        wrong = [] if header is None else list(aggregate_problems(known, header))
        if wrong or isinstance(record, ConstantsRecord):
            return [Finding(f"{SHARD_DIRECTORY}/{shard.file}", message, name) for name, message in wrong]
    if not check.whole:
        return []
    fd = disk.open_inside(root, SHARD_DIRECTORY, shard.file)
    try:
        if isinstance(record, SegmentRecord):
            problems = list(_segment(fd, record, header, known, check))
        else:
            problems = list(_snapshot(fd, record, known))
    finally:
        os.close(fd)
    return [Finding(f"{SHARD_DIRECTORY}/{shard.file}", message, name) for name, message in problems]


def _int64(fd: int, dataset: DatasetRecord) -> NDArray[np.int64]:
    content = bytearray(dataset.spec.nbytes)
    disk.read_at(fd, memoryview(content), dataset.offset)
    return np.frombuffer(content, dtype=np.int64)


def _unlike(dataset: DatasetRecord, spec: DatasetSpec) -> str | None:
    """How a dataset differs from what it should be."""
    ours = (dataset.spec.dtype, dataset.spec.shape, dataset.spec.spans)
    if ours == (spec.dtype, spec.shape, spec.spans):
        return None
    return f"it is {ours[0]} of shape {ours[1]}, expected {spec.dtype} of {spec.shape}"


def _snapshot(fd: int, record: SnapshotRecord, known: Known) -> Problems:
    dataset = known.get(_COUNT.name)
    if dataset is None:
        return
    if wrong := _unlike(dataset, _COUNT):
        yield _COUNT.name, wrong
    elif (count := int(_int64(fd, dataset)[0])) != record.count:
        yield _COUNT.name, f"it says {count} samples, the journal {record.count}"


def _segment(
    fd: int, record: SegmentRecord, header: StoreHeader | None, known: Known, check: ShardCheck
) -> Problems:
    n = len(record.rows)
    rows = known.get("sample/row")
    fits = rows is not None and _unlike(rows, DatasetSpec("sample/row", (n,), "int64")) is None
    if rows is not None and fits and tuple(_int64(fd, rows).tolist()) != record.rows:
        yield "sample/row", "these rows are not those that the journal gives"
    lengths: dict[str, list[int]] = {}
    for family in RAGGED:
        dataset = known.get(family + _OFFSETS)
        if dataset is None:
            continue
        if wrong := _unlike(dataset, DatasetSpec("", (n + 1,), "int64")):
            yield dataset.name, wrong
            continue
        offsets = _int64(fd, dataset)
        if offsets[0] or (np.diff(offsets) < 0).any():
            yield dataset.name, "the offsets do not ascend from 0"
        else:
            lengths[family] = np.diff(offsets).tolist()
    if header is not None:
        yield from _against_plan(record, header, lengths, known, check)


def _against_plan(
    record: SegmentRecord,
    header: StoreHeader,
    lengths: dict[str, list[int]],
    known: Known,
    check: ShardCheck,
) -> Problems:
    """Compare every dataset with what a writer would lay out for these samples."""
    n = len(record.rows)
    present = known.keys() | check.damaged
    try:
        plain = SegmentPlan.build(header, n, lengths, gradients=False).specs
        specs = SegmentPlan.build(header, n, lengths, gradients=True).specs
    except (ValueError, OverflowError) as error:
        if all(family + _OFFSETS not in present or family in lengths for family in RAGGED):
            yield "sample/row", f"the segment does not fit the header: {error}"
        return  # else the offsets are at fault, which is said
    if present.isdisjoint(specs.keys() - plain.keys()):
        specs = plain  # samples without gradients
    for name, spec in specs.items():
        if name not in present:
            yield name, "the segment lacks it"
        elif name in known and (wrong := _unlike(known[name], spec)):
            yield name, wrong
