"""What a disk may hold after the power was cut: recorded system calls, replayed with losses.

The model is POSIX at its weakest. The bytes of a file are certain once the file was synced, and the entries
of a directory once the directory was. Of everything else any part may have arrived: any write or half of one,
any entry, in any combination; a size may have grown without the bytes.
"""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.store.faults import Call, Calls

SECTOR = 512


@dataclass(frozen=True)
class Operation:
    """One change: of a file's bytes, of a directory's entries, or a sync.

    Attributes:
        kind: of a file write, grow, truncate; of a directory link, rename, unlink; of either sync.
        node: number of the file or directory that is meant.
        parent: number of the directory whose entries change.
        names: the entry, or for rename the old and the new one.
        offset: of a write; for grow and truncate the size.
        data: of a write.
    """

    kind: str
    node: int = -1
    parent: int = -1
    names: tuple = ()
    offset: int = 0
    data: bytes = b""


class Recorder:
    """Records what the store's code does to the disk below a directory.

    Attributes:
        operations: in the order in which they happened.
        directories: numbers of the nodes that are directories; 0 is the one below which all happens.
        journal: number of the journal's node.
    """

    def __init__(self, patch, base: Path):
        self.operations: list[Operation] = []
        self.directories = {0}
        self.journal = -1
        self._nodes = {base.resolve(): 0}
        self._made = 1
        self._files: dict[int, int] = {}  # descriptor to node
        self._lock = threading.RLock()
        Calls(patch, self._act)

    def _act(self, call: Call):
        with self._lock:  # the order of the record is the order of the calls
            return getattr(self, f"_{call.name}")(call)

    def _add(self, kind, **what):
        self.operations.append(Operation(kind, **what))

    def _new(self, path: Path) -> None:
        """A file or directory came into being."""
        number = self._made
        self._made += 1
        self._nodes[path] = number
        if path.is_dir():
            self.directories.add(number)
        if path.suffix == ".journal":
            self.journal = number
        self._add("link", node=number, parent=self._nodes[path.parent], names=(path.name,))

    def _open(self, call: Call):
        writes = call.args[1] & os.O_CREAT
        path = Path(call.args[0])
        new = bool(writes) and not path.exists()
        fd = call.go()
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if new:
            self._new(path)
        elif writes and call.args[1] & os.O_TRUNC:
            self._add("truncate", node=self._nodes[path])
        if path in self._nodes:
            self._files[fd] = self._nodes[path]
        else:
            self._files.pop(fd, None)
        return fd

    def _mkdir(self, call: Call):
        call.go()
        self._new(Path(call.args[0]).resolve())

    def _posix_fallocate(self, call: Call):
        call.go()
        fd, offset, size = call.args
        self._add("grow", node=self._files[fd], offset=offset + size)

    def _ftruncate(self, call: Call):
        call.go()
        self._add("truncate", node=self._files[call.args[0]], offset=call.args[1])

    def _pwrite(self, call: Call):
        fd, data, offset = call.args
        written = call.go()
        self._add("write", node=self._files[fd], offset=offset, data=bytes(memoryview(data)[:written]))
        return written

    def _preadv(self, call: Call):
        return call.go()

    def _fsync(self, call: Call):
        call.go()
        if (node := self._files.get(call.args[0])) is not None:
            self._add("sync", node=node)

    def _rename(self, call: Call):
        call.go()
        source, target = (Path(path).parent.resolve() / Path(path).name for path in call.args)
        assert source.parent == target.parent
        self._nodes[target] = node = self._nodes.pop(source)
        self._add("rename", node=node, parent=self._nodes[source.parent], names=(source.name, target.name))

    def _unlink(self, call: Call):
        call.go()
        path = Path(call.args[0]).parent.resolve() / Path(call.args[0]).name
        self._nodes.pop(path, None)
        self._add("unlink", parent=self._nodes[path.parent], names=(path.name,))


@dataclass
class _Node:
    """A file or directory: what is certain, and what was done since."""

    certain: bytearray = field(default_factory=bytearray)
    entries: dict = field(default_factory=dict)
    since: list = field(default_factory=list)


class Disk:
    """The state of a disk while operations happen to it."""

    def __init__(self, directories):
        self._directories = directories
        self._nodes: dict[int, _Node] = {0: _Node()}

    def apply(self, operation: Operation) -> None:
        """One operation, in order."""
        if operation.kind == "link":
            self._nodes.setdefault(operation.node, _Node())
        where = operation.node if operation.parent < 0 else operation.parent
        node = self._nodes[where]
        if operation.kind == "sync":
            for change in node.since:
                _change(node, change, None)
            node.since = []
        else:
            node.since.append(operation)

    def after_power_loss(self, random: Random, target: Path) -> None:
        """Build in ``target`` one of the states in which the disk may be found."""
        mood = random.choice(["all", "none", "prefix", "any", "any"])
        self._build(0, target, random, mood)

    def _build(self, number: int, path: Path, random: Random, mood: str) -> None:
        node = self._nodes[number]
        copy = _Node(bytearray(node.certain), dict(node.entries))
        for change in _arrived(node.since, random, mood):
            _change(copy, change, random if mood == "any" else None)
        if number not in self._directories:
            path.write_bytes(copy.certain)
            return
        path.mkdir()
        for name, inner in copy.entries.items():
            self._build(inner, path / name, random, mood)


def _arrived(changes: list[Operation], random: Random, mood: str) -> Iterator[Operation]:
    if mood == "prefix":
        yield from changes[: random.randint(0, len(changes))]
    elif mood != "none":
        yield from (change for change in changes if mood == "all" or random.random() < 0.5)


def _change(node: _Node, change: Operation, random: Random | None) -> None:
    """Apply a change; with ``random`` a write may be torn."""
    content, entries = node.certain, node.entries
    match change.kind:
        case "write":
            _grow(content, change.offset + len(change.data))
            torn = random is not None and random.random() < 0.5
            for start in range(0, len(change.data), SECTOR):
                if not torn or random.random() < 0.5:
                    piece = change.data[start : start + SECTOR]
                    content[change.offset + start : change.offset + start + len(piece)] = piece
        case "grow":
            _grow(content, change.offset)
        case "truncate":
            del content[change.offset :]
            _grow(content, change.offset)
        case "link":
            entries[change.names[0]] = change.node
        case "unlink":
            entries.pop(change.names[0], None)
        case "rename":
            entries.pop(change.names[0], None)  # it may never have had its old name on the disk
            entries[change.names[1]] = change.node


def _grow(content: bytearray, size: int) -> None:
    content.extend(bytes(max(0, size - len(content))))
