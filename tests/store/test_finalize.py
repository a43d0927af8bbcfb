"""Small shards become large ones and the ranks' aggregates one: nothing that can be read changes."""

import numpy as np
import pytest
import torch

from fisherscope.errors import CorruptStoreError, StoreLockedError
from fisherscope.store import StoreWriter, finalize, open_store
from tests.store.store_cases import Run, assert_holds, header_of, names, toy_layout
from tests.store.test_kronecker_factors import MODULE, sums

BATCHES = tuple((row,) for row in (6, 3, 1, 0, 5, 2, 4))


@pytest.fixture(params=["bfloat16", "float32", "float16"])
def run(request):
    """Seven segments of a single sample each."""
    return Run(header_of(toy_layout(), gradient_dtype=request.param), n=7, batches=BATCHES)


def everything(store, run):
    """Every value that readers give, as bytes."""
    task, found = run.task, {}
    found["samples"] = store.samples(task).to_json(double_precision=15)
    for name in run.gradients:
        found["gradients", name] = store.gradients(task, name).numpy().tobytes()
        found["fisher", name] = store.fisher(task, name).numpy().tobytes()
        found["mean", name] = store.mean(task, name).numpy().tobytes()
    values = store.group_values(task)
    found["square"], found["dot"] = values["square"].values.tobytes(), values["dot"].values.tobytes()
    found["ids"] = [tuple(part.tolist() for part in store.token_ids(task, row)) for row in range(run.n)]
    return found


def test_segments_are_merged(run, root):
    """Seven shards of samples become one; rows, ragged values and every head come back the same."""
    run.write(root)
    before, files = everything(open_store(root), run), names(root / "shards")
    done = finalize(root)
    assert done.shards == (len(files), 3)
    assert len(names(root / "shards")) == 3
    assert everything(open_store(root), run) == before
    assert str(done).startswith("9 shards of ")
    assert finalize(root).shards == (3, 3)
    run.write(root)  # there is nothing left to do
    assert everything(open_store(root), run) == before


@pytest.mark.parametrize("squares", ["plain", "wide"])
def test_ranks_are_merged_and_may_go_on(root, squares):
    """Aggregates of three ranks become one of the same sums, and each rank may extend the task afterwards.

    Also where every rank has units of its own, and something of every sum beside it.
    """
    run = Run(header_of(toy_layout(), squares=squares), n=7, batches=BATCHES)
    kronecker = []
    for rank in range(3):
        with StoreWriter.open(root, run.header, rank=rank) as writer:
            writer.constants(run.constants())
            writer.declare_task(run.task, run.keys)
            share = list(range(rank, 7, 3))
            for batch in share:
                run.write_segment(writer, run.batches[batch])
            count = len(share)
            more = sums(rank, positions=rank + 2)
            extra = {
                "moments/count": torch.tensor([count]),
                "moments/m2": torch.rand(len(run.header.groups), dtype=torch.float64),
            }
            kronecker.append(more)
            writer.snapshot(run.task, share, count, {**run.arrays(share), **more, **extra})
    store = open_store(root)
    before, factors = everything(store, run), store.kronecker(run.task, MODULE)
    finalize(root)
    store = open_store(root)
    assert everything(store, run) == before
    assert len(store.task_index(run.task).snapshots) == 1
    again = store.kronecker(run.task, MODULE)
    assert torch.equal(again.A, factors.A)
    assert torch.equal(again.S, factors.S)
    assert (again.samples, again.positions) == (factors.samples, factors.positions)
    assert store.is_complete(run.task)
    # the mean of the moments is the mean over all samples
    snapshot = store.task_index(run.task).snapshots[0]
    assert snapshot.count == 7
    np.testing.assert_allclose(
        store.aggregate(run.task, "moments/mean"), run.square.double().mean(0), rtol=1e-12
    )
    with StoreWriter.open(root, run.header, rank=1) as writer:
        writer.declare_task(run.task, [*run.keys, "new"])
        assert writer.aggregated_batches(run.task) == set(range(7))
        assert writer.load_snapshot(run.task) is None
        longer = Run(run.header, n=8, batches=(*BATCHES, (7,)))
        longer.write_segment(writer, [7])
        writer.snapshot(run.task, [7], 1, longer.arrays([7]))
    store = open_store(root)
    assert (store.committed(run.task), store.fisher_count(run.task)) == (8, 8)


def test_segments_of_different_kinds_stay_apart(root):
    """Samples without gradients are merged among themselves, and large shards are left alone."""
    run = Run(header_of(toy_layout()), n=7, batches=BATCHES)
    with StoreWriter.open(root, run.header) as writer:
        writer.declare_task(run.task, run.keys)
        for number, rows in enumerate(run.batches):
            with run.open_segment(writer, rows, gradients=number % 2 == 0) as segment:
                run.put(segment, rows, gradients=number % 2 == 0)
                segment.commit()
    done = finalize(root)
    assert done.shards == (7, 2)
    store = open_store(root)
    stored = [store.samples(run.task)["row"].tolist().index(row) for (row,) in BATCHES[::2]]
    for name, expected in run.gradients.items():
        rows = [row for (row,) in BATCHES[::2]]
        assert torch.equal(store.gradients(run.task, name, stored), expected[rows].bfloat16().float())


def test_what_is_damaged_stays(run, root):
    """A damaged shard is not copied with a fresh checksum: the error names it and nothing changes."""
    run.write(root)
    ledger = open_store(root).ledgers[0]
    shard = next(iter(ledger.segments[run.task].values())).shard
    dataset = next(d for d in shard.datasets if d.name == "groups/dot")
    path = root / "shards" / shard.file
    content = bytearray(path.read_bytes())
    content[dataset.offset + 3] ^= 1
    path.write_bytes(content)
    before = names(root / "shards")
    with pytest.raises(CorruptStoreError, match=f"{shard.file}: dataset 'groups/dot' is damaged"):
        finalize(root)
    assert names(root / "shards") == before


def test_a_running_collection_is_not_disturbed(run, root):
    """While a rank writes, nothing is merged."""
    with StoreWriter.open(root, run.header) as writer:
        run.finish(writer)
        with pytest.raises(StoreLockedError):
            finalize(root)


def test_a_reader_from_before_reads_on(run, root):
    """Files that were replaced are gone: an open store finds where the same samples lie now."""
    run.write(root)
    store = open_store(root)
    before = everything(open_store(root), run)
    name = next(iter(run.gradients))
    stream = store.stream(run.task, name)
    finalize(root)
    pieces = [piece.dense() for _, piece in stream]
    assert torch.equal(torch.cat(pieces), store.gradients(run.task, name))
    assert everything(store, run) == before


def test_shards_stay_below_their_largest_size(root, monkeypatch):
    """Merged shards are no larger than SHARD_BYTES, and ones over half of it are not rewritten."""
    import sys

    run = Run(header_of(toy_layout()), n=7, batches=BATCHES)
    run.write(root)
    size = (root / "shards" / "r0000-000003.h5").stat().st_size
    monkeypatch.setattr(sys.modules["fisherscope.store.finalizing"], "SHARD_BYTES", 3 * size)
    finalize(root)
    ledger = open_store(root).ledgers[0]
    assert sorted(len(s.rows) for s in ledger.segments[run.task].values()) == [1, 3, 3]
    assert_holds(open_store(root), run)
