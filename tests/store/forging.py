"""Changing a store as damage or a stranger would: bytes, lines, tables; checksums right or wrong."""

import json
import os

from fisherscope.store.checksum import BlockGrid, block_crcs, file_sha256
from fisherscope.store.journal import Line, decode_line, encode_line
from fisherscope.store.skeleton import DatasetSpec


def flip(path, offset, mask=0x10):
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def journal_of(root, rank=0):
    return root / "journal" / f"r{rank:04d}.journal"


def lines_of(root):
    """The lines of the journal with their newlines."""
    return journal_of(root).read_bytes().splitlines(True)


def records_of(root):
    """What the lines say, without the tables of datasets."""
    return [decode_line(line[:-1]).record for line in lines_of(root)]


def change(data, keys, value):
    """Put a value where a path of keys leads; a function is given what stood there."""
    *path, last = keys
    for key in path:
        data = data[key]
    data[last] = value(data[last]) if callable(value) else value


def rewrite(root, number, edit):
    """Let ``edit`` change the record and the table of a line; the line's checksum is right afterwards."""
    lines = lines_of(root)
    line = decode_line(lines[number][:-1])
    record, table = dict(line.record), json.loads(line.table) if line.table else None
    edit(record, table)
    content = b"" if table is None else json.dumps(table).encode()
    lines[number] = encode_line(Line(record, content))
    journal_of(root).write_bytes(b"".join(lines))


def forge(root, number, dataset, content=None, **changes):
    """Put other bytes into a dataset, or say other things of it, with all checksums right but those given."""

    def edit(record, table):
        entry = next(d for d in table if d["name"] == dataset)
        entry.update(changes)
        path = root / "shards" / record["shard"]
        data = bytearray(path.read_bytes())
        if content is not None:
            data[entry["offset"] : entry["offset"] + len(content)] = content
            path.write_bytes(data)
        fd = os.open(path, os.O_RDONLY)
        spec = DatasetSpec(dataset, tuple(entry["shape"]), entry["dtype"])
        entry["crc32"] = block_crcs(fd, entry["offset"], BlockGrid(spec.nbytes, entry["spans"]))
        record["sha256"] = file_sha256(fd, len(data))
        os.close(fd)
        entry.update(changes)

    rewrite(root, number, edit)
