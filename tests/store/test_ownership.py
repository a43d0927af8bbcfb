"""Whose store this is: who may take it away, who may join it, and what is synced for whom."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fisherscope.errors import CorruptStoreError, StoreLockedError
from fisherscope.store import StoreWriter, disk, finalize, open_store, verify
from fisherscope.store.journal import Line, canonical, decode_line, encode_line
from tests.store.store_cases import Run, assert_holds, header_of, names, toy_layout

REPOSITORY = Path(__file__).parents[2]


def test_a_store_without_a_sample_is_taken_away(small, root):
    """Only by the writer that began it; constants and declared tasks are no samples."""
    with StoreWriter.open(root, small.header, queue=2) as writer:
        writer.constants(small.constants())
        writer.declare_task(small.task, small.keys)
        with small.open_segment(writer, [3, 1]):
            writer.remove_if_empty()
    assert not root.exists()


@pytest.mark.parametrize("why", ["sample", "another rank", "not new", "damaged", "unknown shard"])
def test_a_store_with_anything_else_stays(small, root, why):
    """On any doubt nothing is removed."""
    if why == "not new":
        StoreWriter.open(root, small.header).close()
    with StoreWriter.open(root, small.header, queue=2) as writer:
        writer.declare_task(small.task, small.keys)
        journal = root / "journal" / "r0000.journal"
        if why in {"sample", "damaged"}:
            small.write_segment(writer, [3, 1])
        if why == "another rank":
            StoreWriter.open(root, small.header, rank=1).close()
        if why == "damaged":
            content = bytearray(journal.read_bytes())
            content[20] ^= 1
            journal.write_bytes(content)
        if why == "unknown shard":
            (root / "shards" / "r0007-000003.h5").write_bytes(b"?")
        writer.remove_if_empty()
        assert journal.exists()


CHILD = """
import sys, time
from tests.store.store_cases import Run, header_of, small_layout
from fisherscope.store import StoreWriter
root, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
run = Run(header_of(small_layout()), n=4, batches=((3, 1), (0, 2)))
with StoreWriter.open(root, run.header, rank=rank, world_size=world) as writer:
    print("open", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def running(root):
    """Starts a process that holds a rank of the store open."""
    children = []

    def start(rank, world):
        command = [sys.executable, "-c", CHILD, str(root), str(rank), str(world)]
        child = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout.readline() == "open\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()


def test_ranks_of_different_numbers_of_ranks_do_not_run_together(small, root, running):
    """Rank 1 of 2 is at work: rank 0 of 1 would compute the same samples, rank 0 of 2 would not."""
    child = running(1, 2)
    with pytest.raises(StoreLockedError, match=r"rank 1 of 2 collects into .* rank 0 of 1"):
        StoreWriter.open(root, small.header, rank=0, world_size=1)
    StoreWriter.open(root, small.header, rank=0, world_size=2).close()
    child.kill()
    child.wait()
    StoreWriter.open(root, small.header, rank=0, world_size=1).close()
    assert [ledger.world_size for ledger in open_store(root).ledgers] == [1, 2]


def test_a_single_process_keeps_ranks_out(small, root, running):
    """The other way round, though a journal of a single process does not say that it is one."""
    running(0, 1)
    with pytest.raises(StoreLockedError, match=r"rank 0 of 1 collects into .* rank 1 of 2"):
        StoreWriter.open(root, small.header, rank=1, world_size=2)


def test_a_directory_that_is_removed_while_its_lock_is_awaited_is_made_again(small, root, monkeypatch):
    """Who waits for the lock of a store that its creator takes away begins one of its own."""
    StoreWriter.open(root, small.header).close()
    real, removed = disk.locked_directory, []

    @contextlib.contextmanager
    def stale(path):
        with real(path) as identity:
            if not removed:
                removed.append(root.rename(root.with_name("gone")))
            yield identity

    monkeypatch.setattr(disk, "locked_directory", stale)
    small.write(root)
    assert removed
    assert_holds(open_store(root), small)


def synced_files(monkeypatch):
    """What is synced from now on, by name."""
    found = set()

    def sync(fd):
        found.add(os.path.realpath(f"/proc/self/fd/{fd}"))

    monkeypatch.setattr(disk, "sync", sync)
    return found


def test_process_syncs_everything_in_the_end(small, root, monkeypatch):
    """Also what an earlier process committed, which was killed before it could."""
    writer = StoreWriter.open(root, small.header, durability="process")
    writer.declare_task(small.task, small.keys)
    small.write_segment(writer, [3, 1])
    writer._commits._journal.close()  # killed
    found = synced_files(monkeypatch)
    small.write(root, durability="process")
    every = {str(path) for path in [root, *root.rglob("*")]}
    assert found >= every


def test_power_syncs_what_weaker_writers_left(small, root, monkeypatch):
    """The header and the keys of tasks that are declared already, too: all else rests on them."""
    with StoreWriter.open(root, small.header, durability="none") as writer:
        writer.declare_task(small.task, small.keys)
        small.write_segment(writer, [3, 1])
    before = {str(path) for path in [root, *root.rglob("*")]}
    found = synced_files(monkeypatch)
    small.write(root)
    assert found >= before


def test_finalize_syncs_before_it_removes(small, root, monkeypatch):
    """Whatever was removed is by then in a file that is on the medium, and so is the line that says so."""
    small.write(root)
    events = []
    monkeypatch.setattr(disk, "sync", lambda fd: events.append(os.path.realpath(f"/proc/self/fd/{fd}")))
    unlink = disk.unlink
    monkeypatch.setattr(disk, "unlink", lambda path: (events.append("unlink"), unlink(path)))
    finalize(root)
    first = events.index("unlink")
    (merged,) = [name for name in names(root / "shards") if name == "r0000-000007.h5"] or ["?"]
    journal = str(root / "journal" / "r0000.journal")
    assert journal in events[:first]
    assert any(event.endswith((merged, ".h5")) or ".tmp-" in event for event in events[:first])
    assert_holds(open_store(root), small)


def test_finalize_where_a_later_rank_knows_more_samples(small, root):
    """The task is brought up to date in the journal that takes the merged aggregate."""
    short = Run(small.header, n=2, batches=((0,), (1,)))
    with StoreWriter.open(root, small.header, rank=0) as writer:
        writer.declare_task(small.task, small.keys[:2])
        short.write_segment(writer, [0])
        writer.snapshot(small.task, [0], 1, short.arrays([0]))
    long = Run(small.header, n=4, batches=((0,), (1,), (2,), (3,)))
    with StoreWriter.open(root, small.header, rank=1) as writer:
        writer.declare_task(small.task, small.keys)
        for row in (1, 2, 3):
            long.write_segment(writer, [row])
        writer.snapshot(small.task, [1, 2, 3], 3, long.arrays([1, 2, 3]))
        writer.declare_task("other", ["k"])
    with StoreWriter.open(root, small.header, rank=2) as writer:
        writer.declare_task("other", ["k"])
    before = open_store(root).fisher(small.task, "h.0.q.weight")
    finalize(root)
    store = open_store(root)
    assert torch.equal(store.fisher(small.task, "h.0.q.weight"), before)
    assert store.is_complete(small.task)
    assert verify(root).ok


def test_finalize_of_a_store_that_nobody_has_written_to(small, root):
    """There is nothing to merge."""
    StoreWriter.open(root, small.header).close()
    (root / "journal" / "r0000.journal").unlink()
    assert finalize(root).shards == (0, 0)


def test_keys_that_no_task_names_are_removed(small, root):
    """What a kill left between the file of keys and the line of its task goes with the next declaration."""
    with StoreWriter.open(root, small.header) as writer:
        stray = root / "keys" / ("0" * 64)
        stray.write_text("a\n")
        writer.declare_task(small.task, small.keys)
        assert not stray.exists()
        writer.declare_task("b", ["k"])
    assert len(names(root / "keys")) == 2


def test_a_hole_in_place_of_keys_costs_no_memory(small, root):
    """A file of keys is compared with its digest a piece at a time before it is read."""
    import tracemalloc

    small.write(root)
    path = next((root / "keys").iterdir())
    journal = root / "journal" / "r0000.journal"
    lines = [decode_line(line) for line in journal.read_bytes().splitlines()]
    size = 1 << 30
    for line in lines:
        if line.record["kind"] == "task":
            line.record["extents"][0][0] = size // 100
    journal.write_bytes(b"".join(encode_line(line) for line in lines))
    os.truncate(path, size)
    store = open_store(root)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptStoreError, match="does not hold the keys"):
            store.samples(small.task)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_rows_that_are_not_committed_have_no_token_types(root):
    """Not those of the next row that is."""
    run = Run(header_of(toy_layout()))
    with StoreWriter.open(root, run.header) as writer:
        writer.declare_task(run.task, run.keys)
        run.write_segment(writer, [0, 4])
    for row in (1, 5):
        with pytest.raises(KeyError, match=f"no committed row {row}"):
            open_store(root).token_types(run.task, row)


@pytest.mark.parametrize("key", ["options", "provenance", "fingerprint", "layout"])
def test_a_header_with_control_characters_is_refused(small, root, key):
    """They would reach the terminal with the next inspect."""
    small.write(root)
    path = root / "store.json"
    data = json.loads(path.read_text())
    (data[key] if key != "layout" else data["layout"])["model_type"] = "a\x1b[2Jb"
    path.write_text(json.dumps(data))
    with pytest.raises(CorruptStoreError, match="control characters"):
        open_store(root)


@pytest.mark.parametrize(
    ("name", "dtype", "read"),
    [
        ("fisher/data/h.0.q.weight", "int32", lambda store: store.fisher("math", "h.0.q.weight")),
        ("mean/h.0.q.weight", "int32", lambda store: store.mean("math", "h.0.q.weight")),
        ("moments/mean", "int64", lambda store: store.aggregate("math", "moments/mean")),
    ],
)
def test_aggregates_of_another_type_are_no_numbers(small, root, name, dtype, read):
    """A journal may say that bytes are whole numbers; F is not."""
    small.write(root)
    journal = root / "journal" / "r0000.journal"
    lines = [decode_line(line) for line in journal.read_bytes().splitlines()]
    for index, line in enumerate(lines):
        if line.table:
            table = json.loads(line.table)
            for entry in table:
                if entry["name"] == name:
                    entry["dtype"] = dtype
            lines[index] = Line(line.record, canonical(table))
    journal.write_bytes(b"".join(encode_line(line) for line in lines))
    with pytest.raises(CorruptStoreError, match=f"cannot be {dtype}"):
        read(open_store(root))
    found = verify(root)
    assert not found.ok
    assert name in found.summary()


@pytest.mark.parametrize("samples", [[0.7], np.array([1.0]), ["0"]])
def test_samples_are_chosen_by_whole_numbers(small, root, samples):
    """0.7 is not the first sample."""
    small.write(root)
    with pytest.raises(IndexError, match="whole numbers"):
        open_store(root).gradients("math", "h.0.q.weight", samples)


def test_an_interrupted_close_waits_for_the_thread(small, root, monkeypatch):
    """The journal is not closed under a thread that writes to it."""
    writer = StoreWriter.open(root, small.header, queue=2)
    writer.declare_task(small.task, small.keys)
    sync = disk.sync
    monkeypatch.setattr(disk, "sync", lambda fd: (time.sleep(0.2), sync(fd)))
    small.write_segment(writer, [3, 1])
    import threading

    join, calls = threading.Thread.join, []

    def interrupted(self, timeout=None):
        calls.append(self)
        if len(calls) == 1:
            raise KeyboardInterrupt
        join(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    monkeypatch.undo()
    assert open_store(root).committed(small.task) == 2
