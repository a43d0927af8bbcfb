"""verify(): every kind of damage is found and named, everything is looked at, debris is no damage."""

import json
import os
import stat
import time
import tracemalloc

import numpy as np
import pytest

from fisherscope.errors import StoreFormatError
from fisherscope.store import StoreWriter, journal, open_store, verify
from fisherscope.store.checksum import BLOCK_BYTES
from fisherscope.store.journal import decode_line
from fisherscope.store.records import SnapshotRecord
from tests.store.forging import flip, forge, journal_of, lines_of
from tests.store.store_cases import Run, header_of, names, toy_layout


def segment_of(store, row):
    return next(s for s in store.task_index("math").segments if row in s.rows)


def record_of(segment, name):
    return next(d for d in segment.shard.datasets if d.name == name)


@pytest.fixture
def written(small, root):
    """A finished store, and the run that it is of."""
    small.write(root)
    return root


@pytest.mark.parametrize("quick", [False, True])
def test_nothing_is_wrong_with_a_store_that_was_just_written(toy, root, quick):
    """No findings and no notes; the bytes are those of the files, of which quick leaves the shards unread."""
    toy.write(root)
    found = verify(root, quick=quick)
    assert (found.findings, found.notes, found.quick) == ((), (), quick)
    assert found.ok
    assert found.shards == len(names(root / "shards"))
    files = [path for path in root.rglob("*") if path.is_file() and not (quick and path.suffix == ".h5")]
    assert found.nbytes == sum(path.stat().st_size for path in files)
    assert "nothing is wrong" in found.summary()
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["ok"] is True


@pytest.mark.parametrize("name", ["gradients/decoder/0/Q", "sample/loss", "groups/dot", "ids/offsets"])
def test_a_flipped_byte_names_shard_dataset_and_offsets(written, name):
    """The offsets enclose the byte, within a block of that dataset; quick does not look there."""
    segment = segment_of(open_store(written), 3)
    record = record_of(segment, name)
    position = record.offset + record.spec.nbytes - 1
    flip(written / "shards" / segment.shard.file, position)
    (finding,) = verify(written).findings
    assert (finding.file, finding.dataset) == (f"shards/{segment.shard.file}", name)
    assert record.offset <= finding.start <= position < finding.stop <= record.offset + record.spec.nbytes
    assert finding.stop - finding.start <= BLOCK_BYTES
    for part in (finding.file, name, str(finding.start), str(finding.stop)):
        assert part in verify(written).summary()
    assert verify(written, quick=True).ok


def test_bytes_of_no_dataset_are_called_so(written):
    """HDF5's own metadata before the first dataset, and the zeros between datasets, belong to none."""
    segment = segment_of(open_store(written), 3)
    path = written / "shards" / segment.shard.file
    first = min(d.offset for d in segment.shard.datasets if d.offset)
    tokens = record_of(segment, "sample/tokens")
    for position, start, stop in (
        (100, 0, first),
        (tokens.offset + 4000, tokens.offset + tokens.spec.nbytes, tokens.offset + 4096),
    ):
        flip(path, position)
        (finding,) = verify(written).findings
        assert (finding.dataset, finding.start, finding.stop) == ("metadata or padding", start, stop)
        flip(path, position)
    assert verify(written).ok


def test_everything_is_looked_at_whatever_was_found_before(written):
    """A damaged line, a missing shard, a short one, two damaged datasets, keys: each is a finding."""
    store = open_store(written)
    first, second = segment_of(store, 3), segment_of(store, 0)
    for name in ("groups/square", "gradients/decoder/0/V"):
        flip(written / "shards" / first.shard.file, record_of(first, name).offset)
    path = written / "shards" / second.shard.file
    path.write_bytes(path.read_bytes()[:-1])
    (snapshot,) = store.task_index("math").snapshots
    (written / "shards" / snapshot.shard.file).unlink()
    (keys,) = (written / "keys").iterdir()
    keys.write_bytes(keys.read_bytes()[::-1])
    lines = lines_of(written)
    lines[1] = b"00000000" + lines[1][8:]  # constants
    journal_of(written).write_bytes(b"".join(lines))
    found = [str(finding) for finding in verify(written).findings]
    for words in (
        ("r0000.journal", "line 2 is damaged"),
        (first.shard.file, "groups/square"),
        (first.shard.file, "gradients/decoder/0/V"),
        (second.shard.file, "were committed"),
        (snapshot.shard.file, "missing"),
        (keys.name, "keys"),
    ):
        assert any(all(word in text for word in words) for text in found), words


def test_a_truncated_shard_names_the_datasets_that_are_gone(written):
    """And the ones before the cut are still compared."""
    segment = segment_of(open_store(written), 3)
    path = written / "shards" / segment.shard.file
    last = max(segment.shard.datasets, key=lambda d: d.offset)
    path.write_bytes(path.read_bytes()[: last.offset])
    flip(path, record_of(segment, "sample/row").offset)
    found = {finding.dataset for finding in verify(written).findings}
    assert found == {None, last.name, "sample/row"}


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_only_regular_files_are_shards(written, tmp_path, kind):
    """Nothing hangs on a pipe and no link is followed, in quick mode too."""
    path = written / "shards" / segment_of(open_store(written), 3).shard.file
    path.rename(tmp_path / "moved")
    {
        "link": lambda: path.symlink_to(tmp_path / "moved"),
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
    }[kind]()
    for quick in (True, False):
        (finding,) = verify(written, quick=quick).findings
        assert "regular file" in finding.message
    assert stat.S_ISREG((tmp_path / "moved").stat().st_mode)


def test_a_torn_end_is_a_note_which_says_what_lies_there(written):
    """A crash before the line was whole is no damage; a shard under the next name is worth a look."""
    lines = lines_of(written)
    last = decode_line(lines[-1][:-1]).record["shard"]
    journal_of(written).write_bytes(b"".join(lines[:-1]) + lines[-1][:50])
    found = verify(written)
    torn = next(note for note in found.notes if "50 bytes that are no line" in note)
    assert f"{last}, which that line would commit, lies there" in torn
    (written / "shards" / last).unlink()
    assert any("is not there" in note for note in verify(written).notes)


def test_lines_lost_from_the_end_are_found_by_their_shards(written):
    """Lines cut off whole look like a shorter run; but a crash leaves one uncommitted shard at most."""
    journal_of(written).write_bytes(b"".join(lines_of(written)[:3]))
    (finding,) = verify(written, quick=True).findings
    assert "lines are lost" in finding.message
    assert "r0000-000005.h5 is the first" in finding.message


def test_what_a_crash_leaves_is_noted(written):
    """Temporary files and strangers, in every directory; names are shown escaped."""
    (written / "shards" / ".tmp-r0000-000001").write_bytes(b"x")
    (written / "keys" / "\x1b[2J").write_bytes(b"x")
    (written / "journal" / "r0000.journal~").write_bytes(b"x")
    (written / "notes.txt").write_bytes(b"x")
    found = verify(written)
    assert found.ok
    assert len(found.notes) == 4
    assert all(note.isprintable() for note in found.notes)
    for name in (".tmp-r0000-000001", "[2J", "r0000.journal~", "notes.txt"):
        assert any(name in note for note in found.notes)


@pytest.mark.parametrize(
    ("dataset", "content", "message"),
    [
        ("sample/row", np.array([1, 3]), "not those that the journal gives"),
        ("ids/offsets", np.array([0, 5, 4]), "do not ascend"),
        ("text/offsets", np.array([1, 2, 3]), "do not ascend from 0"),
        ("labels/offsets", np.array([0, 1, 2]), "expected int32 of (2,)"),
    ],
)
def test_values_that_contradict_each_other_are_found(written, dataset, content, message):
    """With every checksum right: rows that are not the journal's, offsets that do not cut their data."""
    forge(written, 3, dataset, content.astype(np.int64).tobytes())
    assert any(message in finding.message for finding in verify(written).findings)
    assert verify(written, quick=True).ok


def test_shapes_that_the_header_does_not_give_are_found(written):
    """A journal that makes a dataset look like another one."""
    forge(written, 3, "gradients/decoder/0/Q", shape=[4, 2, 24])
    found = verify(written).findings
    assert any("expected bfloat16 of (4, 2, 26)" in finding.message for finding in found)


def test_a_wrong_checksum_in_the_journal_is_told_from_damage(written):
    """The sha256 says that the file is as it was; the crc32 of the dataset says otherwise."""
    forge(written, 3, "sample/loss", crc32="00000000")
    (finding,) = verify(written).findings
    assert finding.dataset == "sample/loss"
    assert "the file is as it was committed" in finding.message


def test_a_snapshot_that_counts_otherwise_than_its_line_is_found(small, root):
    """moments/count and the journal's count are the same number."""
    with StoreWriter.open(root, small.header) as writer:
        writer.declare_task(small.task, small.keys)
        small.write_segment(writer, [3, 1])
        writer.snapshot(small.task, [0], 2, {"moments/count": np.array([2])})
        assert verify(root).ok
        small.write_segment(writer, [0, 2])
        writer.snapshot(small.task, [0, 1], 4, {"moments/count": np.array([3])})
    (finding,) = verify(root).findings
    assert "it says 3 samples, the journal 4" in finding.message


def test_a_changed_store_json_is_found_and_the_rest_is_checked(written):
    """Whether it can be read or not."""
    path = written / "store.json"
    content = path.read_bytes()
    flip(written / "shards" / segment_of(open_store(written), 3).shard.file, -1)
    for damaged in (content.replace(b'"per_token"', b'"none"'), b"{", None):
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        found = [finding.file for finding in verify(written).findings]
        assert any(file.startswith("shards/") for file in found)
        assert found.count("store.json") + found.count("journal/r0000.journal") >= 1


def test_what_is_no_store_is_an_error(tmp_path, written):
    """A directory without store.json and journals, a file, another version."""
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nothing", written / "store.json"):
        with pytest.raises(StoreFormatError):
            verify(path)
    path = written / "store.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(StoreFormatError, match="version 99"):
        verify(written)


def test_a_store_that_is_being_written_has_nothing_wrong(small, root, monkeypatch):
    """Snapshots that are replaced while verify looks are not missing."""

    module = __import__("fisherscope.store.verifying", fromlist=["check_shard"])
    with StoreWriter.open(root, small.header) as writer:
        writer.declare_task(small.task, small.keys)
        small.write_segment(writer, [3, 1])
        writer.snapshot(small.task, [0], 2, small.arrays([0]))
        real, looked = module.check_shard, []

        def goes_on(*args, **options):
            if not looked:
                small.write_segment(writer, [0, 2])
                writer.snapshot(small.task, [0, 1], 4, small.arrays([0, 1]))
            looked.append(1)
            return real(*args, **options)

        monkeypatch.setattr(module, "check_shard", goes_on)
        found = verify(root)
        assert looked
        assert found.ok, found.summary()


def test_a_shard_that_is_replaced_between_two_looks_is_not_missing(small, root, monkeypatch):
    """Its bytes were read, its values were still to be: another has taken its place meanwhile."""
    module = __import__("fisherscope.store.verifying", fromlist=["check_values"])
    with StoreWriter.open(root, small.header) as writer:
        writer.declare_task(small.task, small.keys)
        small.write_segment(writer, [3, 1])
        writer.snapshot(small.task, [0], 2, small.arrays([0]))
        real, looked = module.check_values, []

        def goes_on(*args):
            if isinstance(args[1], SnapshotRecord) and not looked:
                looked.append(1)
                writer.snapshot(small.task, [0], 2, small.arrays([0]))
            return real(*args)

        monkeypatch.setattr(module, "check_values", goes_on)
        found = verify(root)
        assert looked
        assert found.ok, found.summary()


def test_a_line_that_is_being_written_is_no_damage(small, root, monkeypatch):
    """What is added to a journal while it is read is left for the next time."""
    small.write(root)
    path = root / "journal" / "r0000.journal"
    content = path.read_bytes()
    cut = len(content) - 40
    path.write_bytes(content[:cut])
    real, grown = journal.decode_line, []

    def growing(line):
        if not grown:
            grown.append(1)
            path.write_bytes(content)
        return real(line)

    monkeypatch.setattr(journal, "decode_line", growing)
    scan = journal.read(root, 0)
    assert scan.good == content[:cut].rfind(b"\n") + 1
    assert open_store(root).committed(small.task) == len(small.keys)


def test_keys_of_what_a_task_once_was_are_looked_at(small, root):
    """A task that grew keeps the file of its first samples, which is verified as the last one is."""
    with StoreWriter.open(root, small.header) as writer:
        writer.declare_task(small.task, small.keys[:2])
        small.write_segment(writer, [1])
    with StoreWriter.open(root, small.header) as writer:
        writer.declare_task(small.task, small.keys)
    (task,) = open_store(root).ledgers[0].tasks.values()
    first = root / "keys" / task.extents[0].keys_sha256
    assert len(task.extents) == 2
    assert verify(root).ok
    content = first.read_bytes()
    first.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert [finding.file for finding in verify(root).findings] == [f"keys/{first.name}"]
    first.unlink()
    assert [finding.file for finding in verify(root, quick=True).findings] == [f"keys/{first.name}"]


@pytest.mark.parametrize("sparse", [False, True])
def test_work_is_bounded_by_the_bytes_that_are_there(small, root, sparse):
    """A line that declares petabytes costs no more than the file has; so does a file that is all hole."""
    small.write(root)
    path = root / "journal" / "r0000.journal"
    lines = path.read_bytes().splitlines()
    number = next(k for k, line in enumerate(lines) if b'"kind":"segment"' in line)
    line = journal.decode_line(lines[number])
    line.record["bytes"] = 1 << 43
    lines[number] = journal.encode_line(line).removesuffix(b"\n")
    path.write_bytes(b"\n".join([*lines, b""]))
    shard = root / "shards" / line.record["shard"]
    if sparse:
        with shard.open("r+b") as file:
            file.truncate(1 << 43)
    begun = time.process_time()
    found = verify(root)
    assert time.process_time() - begun < 20
    assert {finding.file for finding in found.findings} == {f"shards/{shard.name}"}
    assert str(1 << 43) in found.findings[0].message


def test_memory_does_not_grow_with_the_size_of_a_shard(root):
    """One pass in pieces of at most 4 MiB; progress is told up to the end."""
    from fisherscope.layout import AttentionLayout, HeadBlock, ModelLayout, ParameterInfo, Partition

    shape = (2, 3 * 2**19)
    infos = (ParameterInfo("w", shape, "attention", 0),)
    attention = AttentionLayout(
        0, "h", "h.o", 2, 2, (HeadBlock("Q", Partition.regular("w", shape, 0, 2, 1)),)
    )
    run = Run(header_of(ModelLayout("wide", infos, (attention,))), n=4, batches=((2, 0, 1, 3),))
    run.write(root)
    told = []
    tracemalloc.start()
    try:
        assert verify(root, progress=lambda done, total: told.append((done, total))).ok
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    sizes = sum(path.stat().st_size for path in (root / "shards").iterdir())
    assert sizes > 3 * peak
    assert peak < 2 * BLOCK_BYTES
    assert told[-1] == (sizes, sizes)


def test_no_libhdf5(toy, root, monkeypatch):
    """Neither a whole store nor a damaged one is parsed by HDF5."""
    import h5py

    toy.write(root)
    for name in ("File", "h5f"):
        monkeypatch.setattr(h5py, name, None)
    assert verify(root).ok
    flip(next((root / "shards").iterdir()), 40)
    assert not verify(root).ok


def test_all_kinds_of_datasets_are_known(root):
    """A store with whole parameters, blocks, text and segments without gradients has nothing wrong."""
    run = Run(header_of(toy_layout()))
    with StoreWriter.open(root, run.header) as writer:
        writer.declare_task(run.task, run.keys)
        with run.open_segment(writer, [3, 1], gradients=False) as segment:
            run.put(segment, [3, 1], gradients=False)
            segment.commit()
        run.write_segment(writer, [0, 4, 2])
    assert verify(root).ok
