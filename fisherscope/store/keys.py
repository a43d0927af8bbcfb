"""Which samples a task has: their keys in row order, in files named by their own digest.

A task only grows: each extent holds the keys of the ones before it and more behind them, so a sample keeps
its row number for good.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisherscope.errors import CorruptStoreError
from fisherscope.store import disk
from fisherscope.store.disk import Durability

KEYS_DIRECTORY = "keys"
MAX_KEYS_BYTES = 8 << 30
MAX_ROWS = 1 << 32
SHA256 = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(r"[!-~]{1,128}")
_CHARACTERS = bytes(range(ord("!"), ord("~") + 1)) + b"\n"
_PIECE = 4 << 20
_LEAST_BYTES, _MOST_BYTES = 2, 129  # of a key and its newline


@dataclass(frozen=True)
class Extent:
    """The first ``n`` samples of a task.

    Attributes:
        n: number of samples.
        keys_sha256: sha256 over their keys in row order, each followed by a newline; the name of the file.
    """

    n: int
    keys_sha256: str


def sample_key(key: Any) -> str:
    """Check the key of a sample.

    Raises:
        ValueError: not 1 to 128 printable ASCII characters without blanks.
    """
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(f"a sample's key must be 1 to 128 printable ASCII characters, not {key!r}")
    return key


def extent_of(keys: Sequence[str]) -> Extent:
    """The extent that these keys make.

    Raises:
        ValueError: a key is no key, or two are the same.
    """
    if len(set(keys)) != len(keys):
        twice = next(key for key, count in _counts(keys).items() if count > 1)
        raise ValueError(f"two samples have the key {twice!r}: a key says which sample it is")
    return Extent(len(keys), hashlib.sha256(_content(keys)).hexdigest())


def _counts(keys: Sequence[str]) -> dict[str, int]:
    return {key: len(list(same)) for key, same in itertools.groupby(sorted(keys))}


def _content(keys: Sequence[str]) -> bytes:
    return "".join(sample_key(key) + "\n" for key in keys).encode("ascii")


def write_keys(root: Path, keys: Sequence[str], durability: Durability, tmp: str) -> Extent:
    """Write the file of an extent, unless it is there.

    Args:
        root: of the store.
        keys: in row order.
        durability: "power" syncs file and directory.
        tmp: name to write under; what a crash left there is overwritten.

    Raises:
        ValueError: a key is no key, or two are the same.
        StoreFullError: the disk cannot hold it.
    """
    extent = extent_of(keys)
    directory = root / KEYS_DIRECTORY
    disk.make_directory(directory)
    if durability == "power":
        disk.sync_path(root)
    content, final = _content(keys), directory / extent.keys_sha256
    # a file that an earlier writer did not sync may have lost its bytes with the power
    if final.is_symlink() or not final.is_file() or final.read_bytes() != content:
        with disk.full_disk_named(directory / tmp, len(content)):
            fd = disk.create(directory / tmp)
            try:
                disk.write_at(fd, content, 0)
                if durability == "power":
                    disk.sync(fd)
            except BaseException:
                disk.unlink_quietly(directory / tmp)
                raise
            finally:
                os.close(fd)
        disk.rename(directory / tmp, final)
    if durability == "power":
        disk.sync_path(final)
        disk.sync_path(directory)
    return extent


def read_keys(root: Path, extents: Sequence[Extent]) -> list[str]:
    """The keys of a task, in row order, checked against every extent.

    Raises:
        CorruptStoreError: the file is missing or damaged, or no file of a store.
    """
    last = extents[-1]
    path = root / KEYS_DIRECTORY / last.keys_sha256
    check_keys_file(root, last)
    _check_content(root, last)
    content = disk.read_inside(root, KEYS_DIRECTORY, last.keys_sha256, limit=MAX_KEYS_BYTES)
    lines = content.split(b"\n")
    running, done = hashlib.sha256(), 0
    for extent in extents:
        running.update(b"".join(line + b"\n" for line in lines[done : extent.n]))
        done = extent.n
        if running.hexdigest() != extent.keys_sha256:
            raise CorruptStoreError(
                f"{path} does not hold the keys that were declared: restore it from a copy"
            )
    if len(lines) != last.n + 1 or lines[-1]:
        raise CorruptStoreError(f"{path} does not hold {last.n} keys: restore it from a copy")
    try:
        return [sample_key(line.decode("ascii")) for line in lines[: last.n]]
    except ValueError as error:
        raise CorruptStoreError(f"{path}: {error}. Restore it from a copy") from error


def _check_content(root: Path, extent: Extent) -> None:
    """Check digest and characters of a file of keys, a piece at a time: a hole in a file costs no memory.

    Raises:
        CorruptStoreError: they are not those of keys.
    """
    digest = hashlib.sha256()
    with os.fdopen(disk.open_inside(root, KEYS_DIRECTORY, extent.keys_sha256), "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            if piece.translate(None, _CHARACTERS):
                break
        else:
            if digest.hexdigest() == extent.keys_sha256:
                return
    path = root / KEYS_DIRECTORY / extent.keys_sha256
    raise CorruptStoreError(f"{path} does not hold the keys that were declared: restore it from a copy")


def remove_unreferenced(root: Path, named: Collection[str]) -> None:
    """Remove files of keys that no task names; the caller holds the lock of the directory."""
    for name in sorted(os.listdir(root / KEYS_DIRECTORY)):  # noqa: PTH208
        if SHA256.fullmatch(name) and name not in named:
            disk.unlink_quietly(root / KEYS_DIRECTORY / name)


def check_keys_file(root: Path, extent: Extent) -> None:
    """Check that the file of an extent can hold so many keys, without reading it.

    So a few bytes of a journal cannot declare more samples than there are bytes on the disk.

    Raises:
        CorruptStoreError: it cannot.
    """
    path = root / KEYS_DIRECTORY / extent.keys_sha256
    try:
        fd = disk.open_inside(root, KEYS_DIRECTORY, extent.keys_sha256)
    except FileNotFoundError:
        raise CorruptStoreError(f"{path} is missing: restore it from a copy") from None
    try:
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    if not _LEAST_BYTES * extent.n <= size <= min(_MOST_BYTES * extent.n, MAX_KEYS_BYTES):
        raise CorruptStoreError(
            f"{path} has {size} bytes and cannot hold {extent.n} keys: restore it from a copy"
        )
