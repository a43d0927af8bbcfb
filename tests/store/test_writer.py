"""Opening, resuming, refusing: what a writer promises about a store."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fisherscope.errors import (
    CorruptStoreError,
    FingerprintError,
    StoreError,
    StoreExistsError,
    StoreFormatError,
    StoreFullError,
    StoreLockedError,
)
from fisherscope.store import StoreWriter, open_store
from fisherscope.store.disk import DURABILITIES
from tests.store.store_cases import Run, assert_holds, header_of, names, toy_layout


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_run_can_be_resumed_after_every_batch(small, root, durability):
    """Closing and opening between the commits changes nothing in the result."""
    for stop in range(len(small.batches)):
        with StoreWriter.open(root, small.header, durability=durability) as writer:
            writer.declare_task(small.task, small.keys)
            done = {row for rows in small.batches[:stop] for row in rows}
            assert writer.committed_rows(small.task) == done
            small.write_segment(writer, small.batches[stop])
    small.write(root, durability=durability)
    assert_holds(open_store(root), small)


@pytest.mark.parametrize(("durability", "synced"), [("power", True), ("process", False), ("none", False)])
def test_durability_switches_the_syncs_of_a_commit(small, root, monkeypatch, durability, synced):
    """With "power" a commit syncs shard, directory and journal; else it syncs nothing."""
    calls = []
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    with StoreWriter.open(root, small.header, durability=durability) as writer:
        writer.declare_task(small.task, small.keys)
        calls.clear()
        small.write_segment(writer, [0])
        assert calls == ([".tmp-r0000-000000", "shards", "r0000.journal"] if synced else [])
        calls.clear()
    assert bool(calls) == (durability == "process")


def test_leftovers_of_a_crash_are_removed(small, root):
    """Temporary files and shards without a line in the journal go; other ranks' files stay."""
    small.write(root)
    shards = root / "shards"
    kept = sorted(shards.iterdir())
    for name in (".tmp-r0000-000007", "r0000-000099.h5"):
        (shards / name).write_bytes(b"x")
    for name in (".tmp-r0001-000000", "r0001-000003.h5"):
        (shards / name).write_bytes(b"x")
        kept.append(shards / name)
    StoreWriter.open(root, small.header).close()
    assert sorted(shards.iterdir()) == sorted(kept)
    assert_holds(open_store(root), small)


def test_a_lost_snapshot_is_computed_again(small, root, caplog):
    """Aggregates can be made again from the samples: their loss is a warning, that of samples an error."""
    small.write(root)
    (last,) = [s.shard.file for ledger in open_store(root).ledgers for s in ledger.snapshots.values()]
    (root / "shards" / last).unlink()
    with pytest.raises(CorruptStoreError, match=last):
        open_store(root).fisher(small.task, "h.0.q.weight")
    small.write(root)
    assert "is begun again" in caplog.text
    assert_holds(open_store(root), small)
    (root / "shards" / "r0000-000003.h5").unlink()
    with pytest.raises(CorruptStoreError, match=r"r0000-000003\.h5 was committed and is missing"):
        StoreWriter.open(root, small.header)


def test_a_second_writer_of_a_rank_is_refused(small, root):
    """The journal is locked while it is open, and free again afterwards."""
    with (
        StoreWriter.open(root, small.header),
        pytest.raises(StoreLockedError, match="another process writes"),
    ):
        StoreWriter.open(root, small.header)
    StoreWriter.open(root, small.header).close()


def test_another_run_is_refused_with_the_keys_that_differ(small, root):
    """The message spells each differing key of the fingerprint, old value and new."""
    small.write(root)
    other = header_of(
        small.header.layout, fingerprint={"weights": "4567", "plan": {"batch_size": 2}, "seed": 1}
    )
    with pytest.raises(FingerprintError) as error:
        StoreWriter.open(root, other)
    message = str(error.value)
    assert "weights: '0123' in the store, '4567' now" in message
    assert "seed: '<absent>' in the store, 1 now" in message
    assert "batch_size" not in message
    with pytest.raises(FingerprintError, match="gradient_dtype"):
        StoreWriter.open(root, header_of(small.header.layout, gradient_dtype="float32"))
    assert_holds(open_store(root), small)


def test_provenance_and_options_are_no_part_of_the_identity(small, root):
    """A run may be resumed from another machine; the store keeps what it was begun with."""
    small.write(root)
    other = header_of(small.header.layout, provenance={"host": "b"}, options={"quiet": True})
    with StoreWriter.open(root, other) as writer:
        assert writer.header.provenance == small.header.provenance


def test_a_task_with_other_data_is_refused(small, root):
    """Same name, and some of the samples are not given: an error that says which. Nothing is written."""
    small.write(root)
    before = (root / "journal" / "r0000.journal").read_bytes()
    with StoreWriter.open(root, small.header) as writer:
        writer.declare_task(small.task, small.keys)
        assert writer.tasks[small.task].n == 4
        with pytest.raises(FingerprintError, match=r"1 of its 4 samples \(math_3 is the first\)"):
            writer.declare_task(small.task, small.keys[:3])
        with pytest.raises(FingerprintError, match="4 of its 4 samples"):
            writer.declare_task(small.task, ["a", "b", "c", "d", "e"])
        with pytest.raises(ValueError, match="two samples have the key"):
            writer.declare_task(small.task, [*small.keys, small.keys[0]])
    assert (root / "journal" / "r0000.journal").read_bytes() == before


def test_a_task_may_come_in_another_order(small, root):
    """Samples are known by their keys: they keep their rows, and the caller is told which is which."""
    small.write(root)
    with StoreWriter.open(root, small.header) as writer:
        declared = writer.declare_task(small.task, small.keys[::-1])
        assert declared.order == (3, 2, 1, 0)
        assert declared.extents == [range(4)]
        assert writer.committed_rows(small.task) == {0, 1, 2, 3}


def test_a_task_may_be_extended(small, root):
    """More samples in any order: the old ones keep their rows, new ones follow, old batches stay done."""
    small.write(root)
    longer = Run(small.header, n=6, batches=((3, 1), (0, 2), (5, 4)))
    for name in longer.gradients:
        longer.gradients[name][:4] = small.gradients[name]
    longer.square[:4], longer.dot[:4] = small.square, small.dot
    shuffled = [longer.keys[row] for row in (4, 1, 0, 5, 3, 2)]
    with StoreWriter.open(root, small.header) as writer:
        declared = writer.declare_task(small.task, shuffled)
        assert [shuffled[place] for place in declared.order] == longer.keys
        assert declared.extents == [range(4), range(4, 6)]
        store = open_store(root)
        assert (store.n(small.task), store.committed(small.task)) == (6, 4)
        assert not store.is_complete(small.task)
        longer.finish(writer)
    assert_holds(open_store(root), longer)
    with StoreWriter.open(root, small.header) as writer, pytest.raises(FingerprintError, match="2 of its 6"):
        writer.declare_task(small.task, small.keys)


def test_ranks_that_know_fewer_samples_agree(small, root):
    """A rank that saw the task before it was extended does not contradict one that saw it after."""
    with StoreWriter.open(root, small.header, rank=1) as writer:
        writer.declare_task(small.task, small.keys)
    with StoreWriter.open(root, small.header) as writer:
        writer.declare_task(small.task, [*small.keys, "more"])
    assert open_store(root).n(small.task) == 5
    with StoreWriter.open(root, small.header, rank=1) as writer:
        # the first declaration counts: a rank may come with another order
        assert writer.declare_task(small.task, ["more", *small.keys]).order == (1, 2, 3, 4, 0)


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 300, 3])
def test_unusable_names_of_tasks_are_refused(small, root, name):
    """Names are printed and become parts of ids: they must be short and printable."""
    with StoreWriter.open(root, small.header) as writer, pytest.raises(ValueError, match="printable"):
        writer.declare_task(name, small.keys)


def test_directories_that_are_no_store_are_refused(small, root, tmp_path):
    """Nothing is written into a directory that holds something else, nor over a file."""
    root.mkdir()
    (root / "thesis.tex").write_text("x")
    with pytest.raises(StoreExistsError, match=r"thesis\.tex"):
        StoreWriter.open(root, small.header)
    assert names(root) == ["thesis.tex"]
    with pytest.raises(StoreExistsError, match="is a file"):
        StoreWriter.open(root / "thesis.tex", small.header)
    with pytest.raises(StoreFormatError, match="is not a fisherscope store"):
        open_store(root)
    with pytest.raises(StoreFormatError, match="does not exist"):
        open_store(tmp_path / "nowhere")


def test_resume_false_refuses_an_existing_store(small, root):
    """resume=False creates only."""
    StoreWriter.open(root, small.header, resume=False).close()
    with pytest.raises(StoreExistsError, match="resume"):
        StoreWriter.open(root, small.header, resume=False)


def test_another_format_version_is_refused(small, root):
    """By readers and writers, with both versions named."""
    small.write(root)
    path = root / "store.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "format_version": 2}))
    for attempt in (lambda: open_store(root), lambda: StoreWriter.open(root, small.header)):
        with pytest.raises(StoreFormatError, match="format version 2, this fisherscope reads and writes"):
            attempt()


def test_a_crash_before_store_json_was_there_leaves_a_usable_directory(small, root):
    """A directory with nothing but the temporary header counts as empty."""
    root.mkdir()
    (root / ".tmp-store.json").write_text("{")
    small.write(root)
    assert_holds(open_store(root), small)
    assert names(root) == ["journal", "keys", "shards", "store.json"]


@pytest.mark.parametrize("dtype", ["float64", "int8", "bf16"])
def test_other_types_of_gradients_are_refused(small, dtype):
    """Only bfloat16, float32 and float16 can be stored, and the message says so."""
    with pytest.raises(ValueError, match="'bfloat16', 'float32', 'float16'"):
        header_of(small.header.layout, gradient_dtype=dtype)


def test_a_header_is_checked(small):
    """Unknown parameters, normalizations and shapes are refused before anything is created."""
    layout = small.header.layout
    for changes in (
        {"parameters": ("nope",)},
        {"gradient_parameters": ("h.0.q.weight",) * 2},
        {"normalization": "sum"},
        {"fisher_shape": "diagonal"},
    ):
        with pytest.raises(ValueError, match=r"nope|twice|sum|diagonal"):
            header_of(layout, **changes)


def test_rows_are_committed_once(small, root):
    """A row that is committed, or open in another segment, cannot be opened again; nor one too many."""
    with StoreWriter.open(root, small.header) as writer:
        with pytest.raises(StoreError, match="declare_task"):
            writer.segment(small.task, [0])
        writer.declare_task(small.task, small.keys)
        small.write_segment(writer, [3, 1])
        segment = small.open_segment(writer, [0])
        for rows in ([1], [0, 2], [2, 2], []):
            with pytest.raises(ValueError, match="committed already"):
                writer.segment(small.task, rows)
        with pytest.raises(ValueError, match=r"rows 0\.\.3"):
            writer.segment(small.task, [4])
        segment.abort()
        small.write_segment(writer, [0])
        assert writer.committed_rows(small.task) == {0, 1, 3}
        assert not [name for name in names(root / "shards") if name.startswith(".tmp")]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_fewer_rows_may_be_committed(toy, root, rows):
    """commit(rows) keeps the first rows in a smaller shard; the others can be written later."""
    order = [4, 1, 0, 3]
    with StoreWriter.open(root, toy.header) as writer:
        writer.declare_task(toy.task, toy.keys)
        with toy.open_segment(writer, order) as segment:
            toy.put(segment, order[:rows])
            segment.commit(rows)
        assert writer.committed_rows(toy.task) == set(order[:rows])
        store = open_store(root)
        assert store.samples(toy.task)["row"].tolist() == sorted(order[:rows])
        assert (store.n(toy.task), store.committed(toy.task)) == (5, rows)
        with toy.open_segment(writer, [*order[rows:], 2]) as segment:
            toy.put(segment, [*order[rows:], 2])
            segment.commit()
        writer.constants(toy.constants())
        writer.snapshot(toy.task, [0, 1, 2], 5, toy.arrays([0, 1, 2]))
    assert_holds(open_store(root), toy)


def test_committing_no_rows_commits_nothing(small, root):
    """commit(0) gives the segment up."""
    with StoreWriter.open(root, small.header) as writer:
        writer.declare_task(small.task, small.keys)
        small.open_segment(writer, [0, 1]).commit(0)
        assert writer.committed_rows(small.task) == set()
    assert names(root / "shards") == []


@pytest.mark.parametrize("missing", ["h.0.q.bias", "h.0.o.weight", "sample/loss", "labels/ids"])
def test_commit_refuses_a_segment_with_holes(small, root, missing):
    """What was not put is named; once it is put the segment can be committed."""
    rows = [2, 0]
    with StoreWriter.open(root, small.header) as writer:
        writer.declare_task(small.task, small.keys)
        ragged = {"ids": [len(small.ids[r]) for r in rows], "labels": [len(small.labels[r]) for r in rows]}
        segment = writer.segment(small.task, rows, ragged=ragged)
        puts = {
            "sample/length": [3, 1],
            "sample/tokens": [1, 1],
            "sample/truncated": [0, 0],
            "sample/loss": [0.5, 1.5],
            "groups/square": small.square[rows],
            "groups/dot": small.dot[rows],
            "ids/input": [small.ids[r] for r in rows],
            "labels/ids": [small.labels[r] for r in rows],
        }
        for name, values in puts.items():
            if name != missing:
                segment.put(name, 0, values)
        for name, gradients in small.gradients.items():
            segment.put_gradient(name, 0, gradients[rows[: 1 + (name != missing)]])
        expected = missing if "/" in missing else f"gradients/decoder/0/{missing[4].upper()}"
        with pytest.raises(StoreError, match=f"'{expected}' was not written for row"):
            segment.commit()
        if "/" in missing:
            segment.put(missing, 0, puts[missing])
        else:
            segment.put_gradient(missing, 0, small.gradients[missing][rows])
        segment.commit()
        assert writer.committed_rows(small.task) == {0, 2}
        with pytest.raises(StoreError, match="closed"):
            segment.put("sample/loss", 0, [1.0])


def test_arrays_that_do_not_fit_are_refused(small, root):
    """Wrong shapes, rows, lengths, types and names are errors, and nothing is written over other rows."""
    with StoreWriter.open(root, small.header) as writer:
        writer.declare_task(small.task, small.keys)
        segment = small.open_segment(writer, [2, 0, 1])
        with pytest.raises(KeyError, match="no dataset 'sample/nope'"):
            segment.put("sample/nope", 0, [1])
        with pytest.raises(KeyError, match="ids/offsets"):
            segment.put("ids/offsets", 0, [1])
        with pytest.raises(KeyError, match="no gradients of 'nope'"):
            segment.put_gradient("nope", 0, torch.zeros(1))
        for start, array in ((0, [1.0] * 4), (3, [1.0]), (-1, [1.0]), (0, [[1.0]]), (0, 1.0)):
            with pytest.raises(ValueError, match="sample/loss"):
                segment.put("sample/loss", start, array)
        with pytest.raises(ValueError, match="int32"):
            segment.put("sample/length", 0, [2**40, 1, 1])
        with pytest.raises(ValueError, match="int32"):
            segment.put("sample/length", 0, [0.5, 1, 1])
        with pytest.raises(ValueError, match="other rows"):
            segment.put("sample/row", 0, [0, 1, 2])
        for start, array in ((0, [[1]]), (0, [1, 2]), (2, [[1, 2], [3]]), (9, [[1]])):
            with pytest.raises(ValueError, match=r"lengths|no row"):
                segment.put("ids/input", start, array)
        for gradients in (torch.zeros(1, 12, 8), torch.zeros(8, 12), torch.zeros(4, 8, 12)):
            with pytest.raises(ValueError, match="cannot put a tensor"):
                segment.put_gradient("h.0.q.weight", 0, gradients)
        with pytest.raises(ValueError, match="one per sample"):
            writer.segment(small.task, [3], ragged={"ids": [1, 2]})
        with pytest.raises(ValueError, match="nope"):
            writer.segment(small.task, [3], ragged={"nope": [1]})


def test_ragged_values_may_come_flat(small, root):
    """One flat array for several rows equals a list with one array per row."""
    rows = [2, 0, 3]
    with StoreWriter.open(root, small.header) as writer:
        writer.declare_task(small.task, small.keys)
        segment = small.open_segment(writer, rows)
        small.put(segment, rows)
        segment.put("ids/input", 0, np.concatenate([small.ids[2], small.ids[0]]))
        segment.put_ragged("ids/input", 2, torch.tensor(small.ids[3]))
        segment.put("text/bytes", 1, "".join(small.texts[r] for r in (0, 3)).encode())
        segment.commit()
    store = open_store(root)
    assert [store.token_ids(small.task, r)[0].tolist() for r in rows] == [small.ids[r] for r in rows]
    assert store.samples(small.task)["text"].tolist() == [small.texts[r] for r in sorted(rows)]


def test_a_snapshot_replaces_the_former_one(small, root):
    """Only the last shard stays, load_snapshot returns it bit for bit, and it survives reopening."""
    odd = torch.tensor([1e-42, -0.0, float("inf"), 1 / 3])
    with StoreWriter.open(root, small.header) as writer:
        writer.declare_task(small.task, small.keys)
        for rows in small.batches:
            small.write_segment(writer, rows)
        assert writer.load_snapshot(small.task) is None
        writer.snapshot(small.task, [0], 2, {"a": odd, "m": np.array([0.1], dtype=np.float64)})
        writer.snapshot(small.task, [0, 1], 4, {"a": odd * 3, "m": np.array([0.2])})
        first = writer.load_snapshot(small.task)
    with StoreWriter.open(root, small.header) as writer:
        again = writer.load_snapshot(small.task)
    for found in (first, again):
        assert (found.batches, found.count) == ((0, 1), 4)
        assert torch.equal(found.arrays["a"].view(torch.int32), (odd * 3).view(torch.int32))
        assert found.arrays["m"].dtype == torch.float64
        found.arrays["a"].zero_()
    assert len(names(root / "shards")) == 3


def test_constants_are_written_once(small, root):
    """The first call counts: theta does not change during a run."""
    with StoreWriter.open(root, small.header) as writer:
        writer.constants({"groups/theta_square": np.ones(len(small.header.groups))})
        writer.constants({"groups/theta_square": np.zeros(1)})
    assert (open_store(root).constants()["groups/theta_square"] == 1).all()


def test_a_task_is_complete_only_with_all_its_rows(small, root):
    """All rows must be committed, and the aggregates must cover them."""
    with StoreWriter.open(root, small.header) as writer:
        writer.declare_task(small.task, small.keys)
        small.write_segment(writer, [3, 1])
        writer.snapshot(small.task, [0], 2, small.arrays([0]))
        assert not open_store(root).is_complete(small.task)
        small.write_segment(writer, [0, 2])
        assert not open_store(root).is_complete(small.task)
        writer.snapshot(small.task, [0, 1], 4, small.arrays([0, 1]))
        assert open_store(root).is_complete(small.task)


@pytest.mark.parametrize("where", ["segment", "snapshot", "constants"])
def test_a_full_disk_is_a_clear_error_and_loses_nothing(small, root, monkeypatch, where):
    """StoreFullError names the bytes needed and free; no temporary file stays; earlier commits read back."""
    with StoreWriter.open(root, small.header) as writer:
        writer.declare_task(small.task, small.keys)
        small.write_segment(writer, [3, 1])
        writer.snapshot(small.task, [0], 2, small.arrays([0]))
        before = names(root / "shards")

        def full(fd, offset, size):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(StoreFullError, match=r"\d+ bytes .* needed, \d+ bytes .* free"):
                {
                    "segment": lambda: small.open_segment(writer, [0, 2]),
                    "snapshot": lambda: writer.snapshot(small.task, [0, 1], 4, small.arrays([0, 1])),
                    "constants": lambda: writer.constants(small.constants()),
                }[where]()
        assert names(root / "shards") == before
        store = open_store(root)
        expected = small.gradients["h.0.q.weight"][[1, 3]].bfloat16().float()
        assert torch.equal(store.gradients(small.task, "h.0.q.weight"), expected)
        assert store.fisher_count(small.task) == 2
        small.finish(writer)  # with room again the same writer goes on
    assert_holds(open_store(root), small)


def test_ranks_write_side_by_side(toy, root):
    """Two writers at once, each with its own rows and sums: the reader merges them."""
    writers = [StoreWriter.open(root, toy.header, rank=rank) for rank in (0, 1)]
    for rank, writer in enumerate(writers):
        writer.constants(toy.constants())
        writer.declare_task(toy.task, toy.keys)
        for batch in range(rank, 3, 2):
            toy.write_segment(writer, toy.batches[batch])
        share = list(range(rank, 3, 2))
        count = sum(len(toy.batches[b]) for b in share)
        assert not open_store(root).is_complete(toy.task)
        writer.snapshot(toy.task, share, count, toy.arrays(share))
    for writer in writers:
        writer.close()
    store = open_store(root)
    assert store.is_complete(toy.task)
    assert store.fisher_count(toy.task) == toy.n
    for name, expected in toy.gradients.items():
        assert torch.equal(store.gradients(toy.task, name), expected.bfloat16().float())
        np.testing.assert_allclose(
            store.fisher(toy.task, name), expected.square().double().mean(0), rtol=1e-6
        )
        np.testing.assert_allclose(store.mean(toy.task, name), expected.double().mean(0), atol=1e-6)
    with StoreWriter.open(root, toy.header, rank=2) as third:
        assert third.committed_rows(toy.task) == set(range(toy.n))


def test_only_known_durabilities_and_ranks(small, root):
    """Misspelt options are refused before anything is created."""
    with pytest.raises(ValueError, match="durability"):
        StoreWriter.open(root, small.header, durability="disk")
    with pytest.raises(ValueError, match="rank"):
        StoreWriter.open(root, small.header, rank=-1)
    assert not root.exists()


def test_bytes_written_grow_as_pieces_are_put(root):
    """Progress bars may show bytes while a segment is open."""
    run = Run(header_of(toy_layout()))
    with StoreWriter.open(root, run.header) as writer:
        writer.declare_task(run.task, run.keys)
        with run.open_segment(writer, [0]) as segment:
            before = writer.bytes_written
            run.put(segment, [0])
            during = writer.bytes_written
            segment.commit()
        assert before < during <= writer.bytes_written
        assert writer.bytes_written == sum(p.stat().st_size for p in (root / "shards").iterdir())


def test_squares_of_two_kinds_are_not_mixed(root):
    """A store whose squares are plain is read as it is, and no run with units of its own adds to it."""
    plain, wide = (Run(header_of(toy_layout(), squares=squares)) for squares in ("plain", "wide"))
    assert "wide-squares" in wide.header.requires
    assert "wide-squares" not in plain.header.requires
    plain.write(root)
    with pytest.raises(FingerprintError, match=r"header\.squares: 'plain' in the store, 'wide' now"):
        StoreWriter.open(root, wide.header)
    assert_holds(open_store(root), plain)
    other = root.with_name("wide.fs")
    wide.write(other)
    store = open_store(other)
    square = store.group_values(wide.task)["square"].values
    assert square.dtype == np.float64
    np.testing.assert_allclose(square, wide.square.numpy(), rtol=3e-7)
    for name in wide.gradients:
        torch.testing.assert_close(store.fisher(wide.task, name), open_store(root).fisher(plain.task, name))
    with pytest.raises(ValueError, match="squares 'narrow' is none of"):
        header_of(toy_layout(), squares="narrow")
