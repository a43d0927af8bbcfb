"""The journal: whatever happens to its bytes, a prefix of the truth is read or an error raised."""

import io
import json
import zlib
from pathlib import Path

import pytest

from fisherscope.errors import CorruptStoreError, StoreError
from fisherscope.store import StoreWriter, open_store
from fisherscope.store.journal import Line, decode_line, encode_line, scan
from tests.store.store_cases import assert_holds

PATH = Path("r0000.journal")


@pytest.fixture(scope="module")
def content(small, tmp_path_factory):
    """The bytes of a journal with every kind of record."""
    root = tmp_path_factory.mktemp("store") / "run.fs"
    small.write(root)
    return (root / "journal" / "r0000.journal").read_bytes()


def test_a_line_is_what_the_documentation_says(content):
    """crc32 in 8 hex digits, a blank, canonical JSON, a tab and the datasets; lines count from 0."""
    for number, line in enumerate(content.splitlines()):
        crc, _, body = line.partition(b" ")
        assert crc == f"{zlib.crc32(body):08x}".encode()
        head, _, table = body.partition(b"\t")
        record = json.loads(head)
        assert decode_line(line) == Line(record, table)
        assert encode_line(Line(record, table)) == line + b"\n"
        assert record["seq"] == number
        assert head == json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        assert bool(table) == ("shard" in record)
    kinds = [decode_line(line).record["kind"] for line in content.splitlines()]
    assert kinds == ["journal", "constants", "task", "segment", "snapshot", "segment", "snapshot"]


def test_truncated_at_every_byte_a_journal_reads_as_a_prefix(content):
    """A torn end is left out; no line is lost that was whole, none is invented."""
    whole = scan(io.BytesIO(content), PATH).lines
    for length in range(len(content) + 1):
        found = scan(io.BytesIO(content[:length]), PATH)
        count = content[:length].count(b"\n")
        assert found.lines == whole[:count]
        assert found.good == len(b"".join(content.splitlines(True)[:count]))


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_flipped_at_every_byte_a_journal_reads_as_a_prefix_or_not_at_all(content, flip):
    """Damage reads as a torn end in the last line, elsewhere as an error, never as another record."""
    # the lines of segments and snapshots are long and alike: every byte of the short ones, a part of these
    whole = scan(io.BytesIO(content), PATH).lines
    last = content.rstrip(b"\n").rfind(b"\n")
    positions = [p for p in range(len(content)) if p % 7 == flip % 7 or p < 1200 or p > last - 200]
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= flip
        try:
            found = scan(io.BytesIO(bytes(damaged)), PATH).lines
        except CorruptStoreError:
            assert position <= last
        else:
            assert found == whole[: len(found)]
            assert len(found) < len(whole)


def test_zeros_behind_the_last_line_are_a_torn_end(content):
    """A file system may show zeros where the last write did not arrive."""
    assert scan(io.BytesIO(content + bytes(5000)), PATH).good == len(content)


def test_a_reader_of_a_torn_journal_sees_what_was_committed(small, root):
    """open_store does not fail on a torn end, nor change it; the writer cuts it off and goes on."""
    small.write(root)
    path = root / "journal" / "r0000.journal"
    lines = path.read_bytes().splitlines(True)
    torn = b"".join(lines[:6]) + lines[6][:40]
    path.write_bytes(torn)
    store = open_store(root)
    assert store.samples(small.task)["row"].tolist() == [0, 1, 2, 3]
    assert not store.is_complete(small.task)
    assert path.read_bytes() == torn
    small.write(root)
    assert_holds(open_store(root), small)
    assert path.read_bytes().startswith(b"".join(lines[:6]))


def test_damage_before_intact_lines_is_refused_by_reader_and_writer(small, root):
    """Nothing is cut off or removed on the word of a journal that lost committed lines."""
    small.write(root)
    path = root / "journal" / "r0000.journal"
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"segment")] ^= 1
    path.write_bytes(damaged)
    before = sorted((root / "shards").iterdir())
    with pytest.raises(CorruptStoreError, match="line 4 is damaged and 3 intact lines follow"):
        open_store(root)
    with pytest.raises(CorruptStoreError, match=r"r0000\.journal"):
        StoreWriter.open(root, small.header)
    assert path.read_bytes() == damaged
    assert sorted((root / "shards").iterdir()) == before


def test_a_missing_line_is_refused(small, root):
    """Lines are numbered: one that was taken out is missed."""
    small.write(root)
    path = root / "journal" / "r0000.journal"
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join(lines[:3] + lines[4:]))
    with pytest.raises(CorruptStoreError, match="missing or repeated"):
        open_store(root)


def test_a_changed_store_json_is_noticed(small, root):
    """The journal holds the digest of store.json: a changed layout would misread every shard."""
    small.write(root)
    path = root / "store.json"
    path.write_bytes(path.read_bytes().replace(b'"per_token"', b'"none"'))
    with pytest.raises(CorruptStoreError, match=r"store\.json is not the one"):
        open_store(root)


def test_a_writer_that_failed_half_way_writes_no_more(small, root, monkeypatch):
    """After a sync of the journal failed nobody knows what is on the disk: only opening again tells."""
    from fisherscope.store import disk

    writer = StoreWriter.open(root, small.header)
    writer.declare_task(small.task, small.keys)
    real = disk.sync

    def failing(fd):
        if Path(f"/proc/self/fd/{fd}").readlink().suffix == ".journal":
            raise OSError(5, "Input/output error")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "sync", failing)
        with pytest.raises(OSError, match="Input/output"):
            small.write_segment(writer, [3, 1])
    with pytest.raises(StoreError, match="open it again"):
        writer.segment(small.task, [0])
    writer.close()
    small.write(root)
    assert_holds(open_store(root), small)
