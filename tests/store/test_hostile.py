"""Stores that a stranger made: each is refused with its reason, at little cost, and without libhdf5."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from fisherscope.errors import CorruptStoreError, StoreFormatError
from fisherscope.store import open_store, verify
from fisherscope.store.checksum import BLOCK_BYTES
from fisherscope.store.journal import Line, encode_line
from tests.store.forging import change, forge, journal_of, lines_of, records_of, rewrite

ROOT = Path(__file__).resolve().parents[2]
SEGMENT = 3  # the first line that commits samples


@pytest.fixture
def written(small, root):
    small.write(root)
    return root


def shard_of(root, number=SEGMENT):
    return root / "shards" / records_of(root)[number]["shard"]


def read_all(root):
    """Everything that a reader may ask for."""
    store = open_store(root)
    for task in store.tasks:
        frame = store.samples(task)
        for row in frame["row"]:
            store.token_ids(task, row)
        for name in store.gradient_parameters:
            store.gradients(task, name)
        for name in store.parameters:
            store.fisher(task, name)
        store.group_values(task)
        store.groups(task)


def assert_refused(root, match, *, reads=read_all):
    """A reader raises one printable error of the store's, and verify lists it without raising."""
    with pytest.raises(CorruptStoreError, match=match) as error:
        reads(root)
    assert str(error.value).isprintable()
    found = verify(root)
    assert not found.ok
    assert found.summary().replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("shard",), "../store.json", "cannot name"),
        (("shard",), "/etc/passwd", "cannot name"),
        (("shard",), "r0000-000099.h5", "cannot name"),
        (("shard",), "..", "cannot name"),
        (("shard",), 5, "shard"),
        (("bytes",), 2**60, "bytes"),
        (("bytes",), 10**400, "bytes"),
        (("bytes",), -1, "bytes"),
        (("sha256",), "00", "sha256"),
        (("sha256",), "\u001b[2J", "sha256"),
        (("rows",), [0, 0], "repeated"),
        (("rows",), [0, 4], "beyond"),
        (("rows",), [0, 2**50], "rows"),
        (("rows",), [], "rows"),
        (("rows",), ["0", "1"], "rows"),
        (("rows",), [True, False], "rows"),
        (("rows",), [0.0, 1.0], "rows"),
        (("rows",), {"0": 1}, "rows"),
        (("task",), "other", "not declared"),
        (("task",), "a\u001b[2J", "printable"),
        (("task",), "x" * 300, "256"),
        (("replaces",), ["../x"], "names of shards"),
        (("replaces",), ["r0000-000004.h5"], "not there"),
        (("kind",), "virtual", "unknown kind"),
        (("kind",), ["segment"], "unknown kind"),
        (("seq",), 4, "missing or repeated"),
        (("seq",), 3.5, "missing or repeated"),
    ],
)
def test_a_line_that_cannot_be_true_is_refused_at_once(written, keys, value, message):
    """Lines with a right CRC that lead outside, repeat rows, or are of the wrong form: nothing opens."""
    rewrite(written, SEGMENT, lambda record, table: change(record, keys, value))
    assert_refused(written, message, reads=open_store)
    with pytest.raises(CorruptStoreError, match="line 4"):
        open_store(written)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ((0, "offset"), 2**40, "inside its shard"),
        ((0, "offset"), 0, "inside its shard"),
        ((0, "offset"), lambda v: v + 8, "inside its shard"),
        ((0, "offset"), -4096, "offset"),
        ((0, "offset"), 4096.0, "offset"),
        ((0, "offset"), True, "offset"),
        ((0, "offset"), 2**70, "offset"),
        ((1, "offset"), lambda v: v - 4096, "overlap"),
        ((0, "shape"), [2**60], "shape"),
        ((0, "shape"), [2**39, 2**39], "inside its shard"),
        ((0, "shape"), [-1], "shape"),
        ((0, "shape"), [1] * 9, "axes"),
        ((0, "shape"), "2", "shape"),
        ((0, "dtype"), "object", "element type"),
        ((0, "dtype"), ["int64"], "dtype"),
        ((0, "spans"), 0, "spans"),
        ((0, "spans"), 3, "spans"),
        ((0, "crc32"), "", "crc32"),
        ((0, "crc32"), "zzzzzzzz", "crc32"),
        ((0, "name"), "../../secret", "name"),
        ((0, "name"), "/etc", "name"),
        ((0, "name"), "a\u001b[2J", "name"),
        ((0, "name"), "a" * 2000, "name"),
        ((0, "name"), "sample/length", "same name"),
        ((0,), None, "no object"),
    ],
)
def test_a_table_that_cannot_be_true_is_refused_before_anything_is_mapped(written, keys, value, message):
    """Offsets, sizes, shapes and names which lead out of a shard, overlap, or are of the wrong form."""
    rewrite(written, SEGMENT, lambda record, table: change(table, keys, value))
    assert_refused(written, f"{shard_of(written).name} cannot be true.*{message}")


@pytest.mark.parametrize(
    "table", [b"{}", b"null", b"[", b"[" * 100_000, b"[NaN]", b"[1e999]", b'"x"', b"[[]]", b"\xff\xfe"]
)
def test_a_table_that_is_no_list_of_datasets_is_refused(written, table):
    """Deep nesting, no JSON, NaN, other bytes than text: one error that names the shard."""
    lines = lines_of(written)
    record = records_of(written)[SEGMENT]
    lines[SEGMENT] = encode_line(Line(record, table))
    journal_of(written).write_bytes(b"".join(lines))
    assert_refused(written, "cannot be true")


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b'{"seq":NaN}', b'{"seq":3,"kind":"segment","bytes":Infinity}', b"3", b"\xff"]
)
def test_a_line_of_strange_json_is_refused(written, line):
    """Deeply nested, NaN, no object: as damage in the middle of a journal, with a right CRC."""
    import zlib

    lines = lines_of(written)
    lines[SEGMENT] = f"{zlib.crc32(line):08x} ".encode() + line + b"\n"
    journal_of(written).write_bytes(b"".join(lines))
    assert_refused(written, "line 4", reads=open_store)


@pytest.mark.parametrize(
    ("dataset", "shape", "read"),
    [
        ("gradients/decoder/0/Q", [4, 2, 24], lambda s: s.slice("math", layer=0, block="Q", head=0)),
        ("groups/square", [2, 22], lambda s: s.groups("math")),
        ("sample/loss", [1], lambda s: s.samples("math")),
    ],
)
def test_shapes_that_the_header_does_not_give_are_refused(written, dataset, shape, read):
    """A journal may not make a dataset look like another one, though every checksum is right."""
    forge(written, SEGMENT, dataset, shape=shape)
    assert_refused(written, dataset, reads=lambda root: read(open_store(root)))


@pytest.mark.parametrize(
    "offsets", [[0, 3, 1], [0, -1, 5], [1, 2, 5], [0, 5, 10**12], [0, 2**62, 2**63 - 1], [0, 1, 2]]
)
@pytest.mark.parametrize("family", ["ids", "labels", "text"])
def test_offsets_that_do_not_cut_their_data_are_refused(written, family, offsets):
    """Ragged values are never read outside their dataset, though every checksum is right."""
    content = np.array(offsets, dtype=np.uint64 if max(offsets) > 2**62 else np.int64).tobytes()
    forge(written, SEGMENT, f"{family}/offsets", content)
    assert_refused(written, f"{family}/offsets")


def test_text_that_is_no_utf8_is_shown_replaced(written):
    """Other bytes than text become replacement characters, and no error."""
    (dataset,) = [d for d in _table(written) if d["name"] == "text/bytes"]
    forge(written, SEGMENT, "text/bytes", b"\xff" * dataset["shape"][0])
    texts = open_store(written).samples("math")["text"]
    assert "\ufffd" in texts[3]
    assert verify(written).ok


def _table(root, number=SEGMENT):
    tables = []
    rewrite(root, number, lambda record, table: tables.append(json.loads(json.dumps(table))))
    return tables[0]


@pytest.mark.parametrize("where", ["shard", "journal", "keys", "header"])
@pytest.mark.parametrize("kind", ["link", "outside", "fifo", "socket", "device", "directory", "loop"])
def test_only_regular_files_are_read(written, tmp_path, where, kind):
    """Links, also within the store, pipes, sockets, devices and directories: refused without being opened."""
    path = {
        "shard": shard_of(written),
        "journal": journal_of(written),
        "keys": next((written / "keys").iterdir()),
        "header": written / "store.json",
    }[where]
    moved = written / "shards" / "copy" if kind == "link" else tmp_path / "secret"
    path.rename(moved)
    if kind == "device":
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("devices need privileges")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        make_socket(path)
    else:
        path.symlink_to(path if kind == "loop" else moved)
    assert_refused(written, "regular file|symbolic link|No such device|is a socket")


def make_socket(path):
    """A path of a socket may have no more than about 100 characters."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("directory", ["shards", "journal", "keys"])
def test_directories_are_no_links(written, tmp_path, directory):
    """A link in place of a directory of the store leads outside as well."""
    (written / directory).rename(tmp_path / "elsewhere")
    (written / directory).symlink_to(tmp_path / "elsewhere")
    assert_refused(written, "regular file")


def test_a_hard_link_to_a_file_outside_is_not_shown(written, tmp_path):
    """Its bytes are not those whose checksums the journal has: a stranger would have to know them."""
    secret = tmp_path / "secret"
    path = shard_of(written)
    secret.write_bytes(b"s" * path.stat().st_size)
    path.unlink()
    path.hardlink_to(secret)
    assert_refused(written, "damaged")


def test_keys_of_the_wrong_form_are_refused(written):
    """More or fewer keys than samples, blanks, control characters, another file's name."""
    (path,) = (written / "keys").iterdir()
    content = path.read_bytes()
    for damaged in (content[:-1], content * 2, content.replace(b"\n", b" "), b"\x1b[2J" + content[4:], b""):
        path.write_bytes(damaged)
        assert_refused(written, path.name)
    path.unlink()
    assert_refused(written, path.name)


@pytest.mark.parametrize(
    ("extents", "message"),
    [
        ([[2**40, "0" * 64]], "extents"),
        ([[4, "../../etc/passwd"]], "sha256"),
        ([[4, "0" * 63 + "/"]], "sha256"),
        ([[4, "0" * 64], [3, "1" * 64]], "do not grow"),
        ([], "no extents"),
        ([[4]], "pairs"),
        ([[-1, "0" * 64]], "extents"),
        ([[2**31, "KEYS"]], "cannot hold"),
    ],
)
def test_tasks_larger_than_their_keys_are_refused(written, extents, message):
    """A few bytes of a journal cannot declare endless samples, nor name files of their own choice."""
    name = next((written / "keys").iterdir()).name
    given = [[name if value == "KEYS" else value for value in extent] for extent in extents]
    rewrite(written, 2, lambda record, table: change(record, ["extents"], given))
    assert_refused(written, message, reads=open_store)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("batches",), [[0, 2**32, 2]], "progression"),
        (("batches",), [[0, 2**31, 1]], "covers more"),
        (("batches",), [[0, 0, 1]], "progression"),
        (("batches",), [[0, 1, 0]], "progression"),
        (("batches",), [[0, 2, 1], [1, 1, 1]], "twice"),
        (("batches",), [[0, 1]], "count and step"),
        (("count",), 5, "covers more"),
        (("count",), -1, "count"),
        (("merges",), ["x"], "names of shards"),
    ],
)
def test_snapshots_of_more_than_there_is_are_refused(written, keys, value, message):
    """Progressions are bounded by the samples of the task before they are written out."""
    rewrite(written, 6, lambda record, table: change(record, keys, value))
    assert_refused(written, message, reads=open_store)


LAYOUT_BOMBS = {
    "heads": lambda data: change(first_block(data), ["starts"], {"first": 0, "stride": 1, "count": 2**40}),
    "shape": lambda data: change(data["layout"]["parameters"][0], ["shape"], [2**40, 2**40]),
    "negative": lambda data: change(data["layout"]["parameters"][0], ["shape"], [-8, -12]),
    "width": lambda data: change(first_block(data), ["width"], 2**50),
}


def first_block(data):
    return data["layout"]["attention"][0]["blocks"][0]["weight"]


@pytest.mark.parametrize("what", LAYOUT_BOMBS)
def test_a_layout_cannot_declare_endless_heads_or_entries(written, what):
    """A few bytes of store.json do not make its reader build a billion slices, or a tensor of them."""
    path = written / "store.json"
    data = json.loads(path.read_text())
    LAYOUT_BOMBS[what](data)
    path.write_text(json.dumps(data))
    assert_refused(written, r"store\.json")


def test_a_store_of_another_future_is_refused(written):
    """A feature that this reader does not know is named."""
    path = written / "store.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "requires": ["holograms"]}))
    with pytest.raises(StoreFormatError, match="holograms"):
        open_store(written)


HDF5 = {
    "external storage": lambda file, secret: file.create_dataset(
        "gradients/decoder/0/Q", (8,), "u1", external=[(str(secret), 0, 8)]
    ),
    "external link": lambda file, secret: file.__setitem__("gradients", h5py.ExternalLink(str(secret), "/")),
    "soft link": lambda file, secret: file.__setitem__("gradients", h5py.SoftLink("/gradients")),
    "virtual": lambda file, secret: file.create_virtual_dataset("gradients/x", virtual(secret)),
}


def virtual(secret):
    layout = h5py.VirtualLayout((8,), "u1")
    layout[:] = h5py.VirtualSource(str(secret), "x", (8,))
    return layout


@pytest.mark.parametrize("kind", HDF5)
def test_hdf5_that_leads_outside_is_never_parsed(written, tmp_path, monkeypatch, kind):
    """External storage, links and virtual datasets, in a shard whose size and sha256 the journal confirms."""
    path = shard_of(written)
    size = path.stat().st_size
    with h5py.File(tmp_path / "hostile.h5", "w") as file:
        HDF5[kind](file, tmp_path / "secret")
    hostile = (tmp_path / "hostile.h5").read_bytes()
    assert len(hostile) < size
    path.write_bytes(hostile + bytes(size - len(hostile)))
    forge(written, SEGMENT, "sample/loss")

    def never(*args, **options):
        raise AssertionError("libhdf5 was called")

    for name in ("File", "Dataset", "Group"):
        monkeypatch.setattr(getattr(h5py, name), "__init__", never)
    monkeypatch.setattr(h5py.h5f, "open", never)
    assert_refused(written, "damaged|not the journal's|offsets")


# what is done to a store, what a reader makes of it, and what verify does
BOMBS = {
    "endless line": (lambda root: append(root, b'00000000 {"rows":[' + b"1," * (8 << 20)), "read", "ok"),
    "many lines": (lambda root: append(root, b'00000000 {"kind":"task"}\n' * (1 << 18)), "read", "found"),
    "journal of holes": (lambda root: os.truncate(journal_of(root), 400 << 20), "read", "found"),
    "journal too large": (lambda root: os.truncate(journal_of(root), 5 << 30), "refused", "found"),
    "keys of holes": (lambda root: os.truncate(keys_of(root), 7 << 30), "refused", "found"),
    "keys too large": (lambda root: os.truncate(keys_of(root), 9 << 30), "refused", "found"),
    "header of holes": (lambda root: os.truncate(root / "store.json", 50 << 20), "refused", "found"),
    "header too large": (lambda root: os.truncate(root / "store.json", 1 << 40), "refused", "found"),
    "shard of holes": (lambda root: os.truncate(shard_of(root), 1 << 42), "refused", "found"),
}


def keys_of(root):
    (path,) = (root / "keys").iterdir()
    return path


def append(root, content):
    with journal_of(root).open("ab") as file:
        file.write(content)


READER = """
import os, resource, sys
sys.path.insert(0, {tree!r})
import torch
torch.set_num_threads(1)
from tests.store.test_hostile import read_all
from fisherscope.errors import StoreError
from fisherscope.store import verify

def look(root):
    before = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (before + {room}, before + {room}))
    resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
    try:
        read_all(root)
        print("read")
    except StoreError as error:
        print("refused" if str(error).isprintable() else error)
    print("ok" if verify(root, quick=True).ok else "found", flush=True)

for line in sys.stdin:
    if not os.fork():
        look(line.rstrip())
        os._exit(0)
    print("ended", os.wait()[1], flush=True)
"""


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Reads each store in a fork of a small process; returns the lines that it prints."""
    script = textwrap.dedent(READER).format(tree=str(ROOT), room=256 << 20, seconds=60)
    complaints = tmp_path_factory.mktemp("reader") / "stderr"
    with (
        complaints.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process,
    ):

        def read(root):
            process.stdin.write(f"{root}\n")
            process.stdin.flush()
            lines = []
            while not lines or not lines[-1].startswith("ended"):
                line = process.stdout.readline()
                assert line, complaints.read_text()[-2000:]
                lines.append(line.rstrip("\n"))
            assert lines.pop() == "ended 0", complaints.read_text()[-2000:]
            return lines

        yield read
        process.stdin.close()


@pytest.mark.parametrize("what", BOMBS)
def test_bombs_cost_little_memory_and_time(written, reader, what):
    """In a process that may take 256 MiB more and a minute: read as far as it is true, or an error."""
    try:
        BOMBS[what][0](written)
    except OSError:
        pytest.skip("the file system has no holes of this size")
    assert reader(written) == list(BOMBS[what][1:])


def test_a_shard_of_terabytes_of_holes_costs_nothing(written):
    """A sparse file of which one dataset is declared to hold most: refused, and not read or allocated."""
    size = 1 << 42
    try:
        os.truncate(shard_of(written), size)
    except OSError:
        pytest.skip("the file system has no holes of this size")

    def edit(record, table):
        record["bytes"] = size
        last = max(table, key=lambda d: d["offset"])
        last["shape"], last["spans"], last["dtype"] = [(size - last["offset"]) // 8], 1, "int64"
        last["crc32"] = "00000000" * -(-8 * last["shape"][0] // BLOCK_BYTES)

    rewrite(written, SEGMENT, edit)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptStoreError):
            read_all(written)
        for quick in (True, False):
            (finding,) = [found for found in verify(written, quick=quick).findings if found.start is None]
            assert "are on the disk" in finding.message
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()
