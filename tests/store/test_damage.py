"""Damaged, missing and hostile files: an error that names the place, never zeros, never a wrong value."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch

from fisherscope.errors import CorruptStoreError, NotStoredError, StoreError, StoreFormatError, UsageError
from fisherscope.report import analyze
from fisherscope.store import StoreWriter, open_store
from fisherscope.store.checksum import BLOCK_BYTES, BlockGrid
from fisherscope.store.inspect import describe
from tests.store.store_cases import Run, header_of, small_layout, toy_layout


def _segment_with(store, task, row):
    """The committed segment that holds a row."""
    return next(s for s in store.task_index(task).segments if row in s.rows)


def _flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("dataset", "read"),
    [
        ("gradients/decoder/0/K", lambda s: s.gradients("math", "h.0.k.weight")),
        ("gradients/decoder/0/Q", lambda s: s.slice("math", layer=0, block="Q", head=0)),
        ("gradients/decoder/0/Q", lambda s: s.slices("math", layer=0, block="Q", part="bias")),
        ("groups/square", lambda s: s.groups("math")),
        ("groups/dot", lambda s: s.group_values("math")),
        ("sample/loss", lambda s: s.samples("math")),
        ("ids/offsets", lambda s: s.token_ids("math", 3)),
        ("labels/ids", lambda s: s.token_ids("math", 3)),
        ("text/bytes", lambda s: s.samples("math")),
    ],
)
def test_a_flipped_byte_is_found_on_first_touch(small, root, dataset, read):
    """The error names shard, dataset and where in the file; other datasets still read."""
    small.write(root)
    store = open_store(root)
    shard = _segment_with(store, "math", 3).shard
    record = next(d for d in shard.datasets if d.name == dataset)
    _flip(root / "shards" / shard.file, record.offset + 1)
    with pytest.raises(CorruptStoreError) as error:
        read(open_store(root))
    message = str(error.value)
    assert shard.file in message
    assert repr(dataset) in message
    assert str(record.offset) in message
    assert torch.isfinite(store.gradients("math", "h.0.v.weight")).all()


@pytest.mark.parametrize("name", ["fisher/data/h.0.q.weight", "mean/h.0.o.weight"])
def test_a_damaged_aggregate_is_found(small, root, name):
    """By the reader, and by the writer that would go on from it."""
    small.write(root)
    (snapshot,) = open_store(root).task_index("math").snapshots
    record = next(d for d in snapshot.shard.datasets if d.name == name)
    _flip(root / "shards" / snapshot.shard.file, record.offset)
    store, parameter = open_store(root), name.split("/")[-1]
    with pytest.raises(CorruptStoreError, match=name):
        store.fisher("math", parameter) if "fisher" in name else store.mean("math", parameter)
    with (
        StoreWriter.open(root, small.header) as writer,
        pytest.raises(CorruptStoreError, match=name),
    ):
        writer.load_snapshot("math")


def test_reading_a_head_touches_that_head_alone(small, root):
    """Damage in one head does not keep the others from being read: no block straddles a head."""
    small.write(root)
    store = open_store(root)
    shard = _segment_with(store, "math", 3).shard
    record = next(d for d in shard.datasets if d.name == "gradients/decoder/0/O")
    assert record.spec.spans == 4
    _flip(root / "shards" / shard.file, record.offset + 2 * record.grid.span_bytes)
    store = open_store(root)
    for head in (0, 1, 3):
        store.slice("math", layer=0, block="O", head=head)
    with pytest.raises(CorruptStoreError):
        store.slice("math", layer=0, block="O", head=2)
    with pytest.raises(CorruptStoreError):
        store.gradients("math", "h.0.o.weight")


@pytest.mark.parametrize("what", ["missing", "short", "long", "empty"])
def test_a_missing_or_resized_shard_is_an_error(small, root, what):
    """Never zeros: reader and writer name the shard."""
    small.write(root)
    shard = _segment_with(open_store(root), "math", 3).shard
    path = root / "shards" / shard.file
    content = path.read_bytes()
    if what == "missing":
        path.unlink()
    else:
        path.write_bytes({"short": content[:-1], "long": content + b"x", "empty": b""}[what])
    for attempt in (
        lambda: open_store(root).gradients("math", "h.0.q.weight"),
        lambda: StoreWriter.open(root, small.header),
    ):
        with pytest.raises(CorruptStoreError, match=shard.file):
            attempt()


@pytest.mark.parametrize("kind", ["link", "directory link", "fifo", "directory"])
def test_only_regular_files_inside_the_store_are_read(small, root, tmp_path, kind):
    """A link could lead to any file of its reader, a pipe would hang."""
    small.write(root)
    shard = _segment_with(open_store(root), "math", 3).shard
    path = root / "shards" / shard.file
    if kind == "directory link":
        (root / "shards").rename(tmp_path / "elsewhere")
        (root / "shards").symlink_to(tmp_path / "elsewhere")
    else:
        path.rename(tmp_path / "moved")
        if kind == "link":
            path.symlink_to(tmp_path / "moved")
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            path.mkdir()
    with pytest.raises(CorruptStoreError, match="regular file"):
        open_store(root).gradients("math", "h.0.q.weight")


@pytest.mark.parametrize("name", ["store.json", "journal/r0000.journal"])
def test_links_in_place_of_the_header_and_the_journal_are_refused(small, root, tmp_path, name):
    """As for shards."""
    small.write(root)
    (root / name).rename(tmp_path / "moved")
    (root / name).symlink_to(tmp_path / "moved")
    with pytest.raises(CorruptStoreError, match="regular file"):
        open_store(root)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100000, b'{"format": NaN}', b"null"]
)
def test_a_broken_store_json_is_a_store_error(small, root, content):
    """Whatever stands there, the error is one of the store's."""
    small.write(root)
    (root / "store.json").write_bytes(content)
    with pytest.raises((CorruptStoreError, StoreFormatError), match=r"store\.json"):
        open_store(root)


@pytest.mark.parametrize("key", ["fingerprint", "layout", "parameters", "normalization", "gradient_dtype"])
@pytest.mark.parametrize("value", [None, 3, ["x"], {"x": 1}, "x"])
def test_fields_of_the_wrong_form_are_refused(small, root, key, value):
    """A header is checked field by field."""
    small.write(root)
    path = root / "store.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CorruptStoreError):
        open_store(root)


def test_a_layout_cannot_declare_endless_heads(small, root):
    """A few bytes of store.json do not make its reader build a billion slices."""
    small.write(root)
    path = root / "store.json"
    data = json.loads(path.read_text())
    weight = data["layout"]["attention"][0]["blocks"][0]["weight"]
    weight["starts"] = {"first": 0, "stride": 1, "count": 2**40}
    weight["shape"] = data["layout"]["parameters"][0]["shape"] = [2**40, 1]
    path.write_text(json.dumps(data))
    with pytest.raises(CorruptStoreError, match="heads and channels"):
        open_store(root)


def test_asking_for_what_does_not_exist_names_what_does(small, root):
    """KeyError for unknown names, IndexError for heads."""
    small.write(root)
    store = open_store(root)
    with pytest.raises(KeyError, match=r"'mth'.*math"):
        store.samples("mth")
    with pytest.raises(KeyError, match=r"h\.0\.q\.weigth.*h\.0\.q\.weight"):
        store.gradients("math", "h.0.q.weigth")
    with pytest.raises(KeyError, match="nope"):
        store.fisher("math", "nope")
    with pytest.raises(KeyError, match="no block 'X'"):
        store.slice("math", layer=0, block="X", head=0)
    with pytest.raises(KeyError, match="layers with attention"):
        store.slice("math", layer=7, block="Q", head=0)
    with pytest.raises(KeyError, match="no per-head bias"):
        store.slices("math", layer=0, block="O", part="bias")
    for head in (4, -1):
        with pytest.raises(IndexError):
            store.slice("math", layer=0, block="Q", head=head)
    with pytest.raises(KeyError, match="no committed row 9"):
        store.token_ids("math", 9)


def test_asking_for_what_was_not_collected_says_what_to_collect(root):
    """NotStoredError names the extension or option that would store it."""
    layout = small_layout()
    header = header_of(
        layout,
        parameters=("h.0.q.weight", "h.0.k.weight"),
        gradient_parameters=("h.0.q.weight",),
        fisher_shape="groups",
    )
    run = Run(header, n=2, batches=((0, 1),))
    with StoreWriter.open(root, header) as writer:
        writer.declare_task(run.task, run.keys)
        store = open_store(root)
        assert len(store.samples(run.task)) == 0
        assert store.gradients(run.task, "h.0.q.weight").shape == (0, 8, 12)
        assert np.isnan(store.groups(run.task)["mean"]).all()
        with pytest.raises(NotStoredError, match="no aggregate of task 'math' is committed yet"):
            store.fisher(run.task, "h.0.q.weight")
        with writer.segment(run.task, [0, 1]) as segment:
            for name in ("length", "tokens", "loss", "truncated"):
                segment.put(f"sample/{name}", 0, [1, 1])
            for name in ("square", "dot"):
                segment.put(f"groups/{name}", 0, np.ones((2, len(header.groups))))
            segment.put_gradient("h.0.q.weight", 0, run.gradients["h.0.q.weight"])
            segment.commit()
        writer.snapshot(run.task, [0], 2, {"moments/mean": np.zeros(3)})
    with pytest.raises(KeyError, match="text"):
        open_store(root).samples(run.task)["text"]
    store.refresh()
    for match, read in {
        r"SampleGradients\(parameters=\[\.\.\., 'h\.0\.k\.weight'": lambda: store.gradients(
            "math", "h.0.k.weight"
        ),
        r"SampleGradients": lambda: store.slice("math", layer=0, block="K", head=0),
        r"parameters=\[\.\.\., 'h\.0\.v\.weight'": lambda: store.fisher("math", "h.0.v.weight"),
        r"Fisher\(shape='full'\)": lambda: store.fisher("math", "h.0.q.weight"),
        r"holds group values only": lambda: store.mean("math", "h.0.q.weight"),
        r"no token ids": lambda: store.token_ids("math", 0),
        r"no aggregate 'x'": lambda: store.aggregate("math", "x"),
    }.items():
        with pytest.raises(NotStoredError, match=match):
            read()


def test_other_label_sources_are_named(small, root):
    """Fisher of sampled labels: what was asked for and what there is are named."""
    small.write(root)
    with pytest.raises(
        NotStoredError, match=r"no Fisher of labels='sampled': collect again with extensions=\(Fisher"
    ):
        open_store(root).fisher("math", "h.0.q.weight", labels="sampled")


def test_a_reader_sees_what_was_committed_when_it_looked(small, root):
    """Samples that were committed after opening appear with refresh(); a replaced snapshot is followed."""
    with StoreWriter.open(root, small.header) as writer:
        writer.declare_task(small.task, small.keys)
        small.write_segment(writer, [3, 1])
        writer.snapshot(small.task, [0], 2, small.arrays([0]))
        store = open_store(root)
        small.write_segment(writer, [0, 2])
        writer.snapshot(small.task, [0, 1], 4, small.arrays([0, 1]))
        expected = small.arrays([0, 1])["fisher/data/h.0.q.weight"].double() / 4
        assert torch.equal(store.fisher("math", "h.0.q.weight"), expected.float())
        assert store.fisher_count("math") == 4
        assert store.samples("math")["row"].tolist() == [1, 3]
        assert not store.is_complete("math")
        store.refresh()
        assert store.samples("math")["row"].tolist() == [0, 1, 2, 3]


def test_many_shards_do_not_exhaust_file_descriptors(small, root, monkeypatch):
    """Only the last used shards stay open, and what was checked once is not checked again."""
    from fisherscope.store import mapped, opened

    monkeypatch.setattr(opened, "_OPEN_SHARDS", 1)
    small.write(root)
    store = open_store(root)
    store.gradients("math", "h.0.q.weight")
    checks = []
    monkeypatch.setattr(mapped, "crc32_hex", lambda data: checks.append(1))
    store.gradients("math", "h.0.q.weight")
    assert not checks
    assert len(store._shards) == 1


def test_a_row_committed_by_two_ranks_is_refused(small, root):
    """Two writers with overlapping shares would count samples twice."""
    writers = [StoreWriter.open(root, small.header, rank=rank) for rank in (0, 1)]
    for writer in writers:
        writer.declare_task(small.task, small.keys)
    for writer in writers:
        small.write_segment(writer, [2])
        writer.close()
    with pytest.raises(CorruptStoreError, match="row 2 of task 'math' is committed by two ranks"):
        open_store(root)


@pytest.mark.parametrize("nbytes", [0, 1, BLOCK_BYTES - 2, BLOCK_BYTES, BLOCK_BYTES + 2, 3 * BLOCK_BYTES + 4])
@pytest.mark.parametrize("spans", [1, 2])
def test_blocks_cover_every_byte_once_and_straddle_no_span(nbytes, spans):
    """Blocks are at most 4 MiB, adjacent, and end where a head ends."""
    grid = BlockGrid(nbytes * spans, spans)
    bounds = [grid.bounds(block) for block in range(len(grid))]
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])] or not bounds
    assert sum(stop - start for start, stop in bounds) == nbytes * spans
    for start, stop in bounds:
        assert 0 < stop - start <= BLOCK_BYTES
        assert start // grid.span_bytes == (stop - 1) // grid.span_bytes
    for byte in range(0, nbytes * spans, max(1, nbytes // 5)):
        (block,) = np.flatnonzero(grid.touched(np.array([[byte, byte + 1]])))
        assert bounds[block][0] <= byte < bounds[block][1]


def test_large_heads_are_checked_block_by_block(root):
    """A head of more than 4 MiB has several blocks; only those of the rows read are checked."""
    from fisherscope.layout import AttentionLayout, HeadBlock, ModelLayout, ParameterInfo, Partition

    shape = (2, 3 * 2**19)
    infos = (ParameterInfo("w", shape, "attention", 0),)
    attention = AttentionLayout(
        0, "h", "h.o", 2, 2, (HeadBlock("Q", Partition.regular("w", shape, 0, 2, 1)),)
    )
    run = Run(header_of(ModelLayout("wide", infos, (attention,))), n=3, batches=((2, 0, 1),))
    run.write(root)
    store = open_store(root)
    segment = _segment_with(store, "math", 0)
    record = next(d for d in segment.shard.datasets if d.name == "gradients/decoder/0/Q")
    assert len(record.grid) == 2 * 3
    _flip(root / "shards" / segment.shard.file, record.offset + 9 * 2**20 - 1)  # last row of head 0
    store = open_store(root)
    found = store.slice("math", layer=0, block="Q", head=0, samples=[2])
    assert torch.equal(found, run.gradients["w"][[2], 0].bfloat16().float())
    store.slice("math", layer=0, block="Q", head=1)
    with pytest.raises(CorruptStoreError, match="gradients/decoder/0/Q"):
        store.slice("math", layer=0, block="Q", head=0, samples=[1])


def test_a_description_is_plain_data(root):
    """describe() gives JSON, its bytes add up to what lies on the disk, and it opens no shard."""
    run = Run(header_of(toy_layout()))
    run.write(root)
    found = json.loads(json.dumps(describe(root), allow_nan=False))
    assert found["tasks"] == {"math": {"samples": 5, "committed": 5, "complete": True, "aggregated": 5}}
    assert found["bytes"].pop("total") == sum(found["bytes"].values())
    assert sum(found["bytes"].values()) == sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    entries = sum(g[0].numel() for g in run.gradients.values())
    assert found["bytes"]["gradients"] == 2 * 5 * entries
    assert found["layout"]["heads"] == [3, 4]
    assert found["provenance"] == {"fisherscope": "0.1.0"}
    for path in (root / "shards").iterdir():
        path.unlink()
    assert describe(root)["shards"] == found["shards"]


def test_sizes_are_estimated_exactly(root):
    """bytes_per_sample and snapshot_bytes are what the store then takes, apart from padding and metadata."""
    from fisherscope.store.size import bytes_per_sample, snapshot_bytes

    run = Run(header_of(toy_layout(), squares="wide"), n=1, batches=((0,),))
    run.write(root)
    header = run.header
    found = describe(root)["bytes"]
    text = len(run.texts[0].encode())
    sample = bytes_per_sample(
        header.layout, header.parameters, header.gradient_parameters, "bfloat16", len(run.ids[0]), text
    )
    assert sample["groups"] == found["groups"]
    assert sample["gradients"] == found["gradients"]
    assert sample["tokens"] + sample["text"] + sample["samples"] == (
        found["samples"] + found["tokens"] + found["text"] - 24  # one offset more than samples, per family
    )
    snapshot = snapshot_bytes(header.layout, header.parameters)
    assert snapshot["fisher"] + snapshot["mean"] + snapshot["moments"] / 2 == found["aggregates"]
    assert snapshot_bytes(header.layout, header.parameters, fisher_shape="groups")["fisher"] == 0


@pytest.mark.parametrize("other", [["run.fs"], {"a": "run.fs"}, None, 5])
def test_what_is_no_store_says_what_is_taken(other):
    """Several stores, or anything else."""
    for call in (analyze, describe):
        with pytest.raises(UsageError, match=r"is no store: pass one store, or the path"):
            call(other)


def test_paths_that_lead_nowhere(small, root):
    """Moved, deleted, a link into nothing, a file, a name that is too long: what it is, and what to do."""
    small.write(root)
    store = open_store(root)
    moved = root.with_name("moved.fs")
    root.rename(moved)
    for call in (store.refresh, lambda: open_store(root), lambda: store.gradients("math", "h.0.q.weight")):
        with pytest.raises(StoreFormatError, match=r"does not exist \(was it moved or deleted\?\)"):
            call()
    root.symlink_to(root.with_name("nowhere"))
    with pytest.raises(StoreFormatError, match=r"is a link to .*nowhere, which does not exist"):
        open_store(root)
    file = root.with_name("file")
    file.touch()
    with pytest.raises(StoreFormatError, match="it is a file"):
        open_store(file)
    for call in (open_store, lambda path: StoreWriter.open(path, small.header)):
        with pytest.raises(StoreError, match=r"is a name of 300 bytes, and file systems take 255"):
            call(root.with_name("x" * 300))
    assert open_store(moved).committed("math") == 4


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync(small, root, monkeypatch, number):
    """The error names the durability that it can give, and with that the store is written."""

    def refuse(fd):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreError, match=r"loss of power.*durability='process'"):
        small.write(root)
    monkeypatch.undo()
    shutil.rmtree(root)
    monkeypatch.setattr(os, "fsync", refuse)
    small.write(root, durability="process")
    assert open_store(root).is_complete("math")
