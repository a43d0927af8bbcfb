"""Creating a store's directory, and repairing what a crash left in it."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from fisherscope.errors import CorruptStoreError, StoreExistsError
from fisherscope.store import disk
from fisherscope.store.disk import Durability
from fisherscope.store.keys import KEYS_DIRECTORY
from fisherscope.store.ledger import Ledger
from fisherscope.store.schema import (
    HEADER_FILE,
    JOURNAL_DIRECTORY,
    SHARD_DIRECTORY,
    StoreHeader,
    check_identity,
    encode_header,
    read_header,
)
from fisherscope.store.shard_record import ShardRecord

logger = logging.getLogger(__name__)

_TMP_HEADER = f"{disk.TMP_PREFIX}{HEADER_FILE}"


def tmp_prefix(rank: int) -> str:
    """How the names of a rank's temporary files start."""
    return f"{disk.TMP_PREFIX}r{rank:04d}-"


def create_or_check(
    root: Path, header: StoreHeader, durability: Durability, *, resume: bool
) -> tuple[StoreHeader, str]:
    """Create the store, or check that the store in ``root`` is of the same run.

    Returns:
        The header in the store, and the sha256 of ``store.json``.

    Raises:
        StoreExistsError: the directory holds something else, or a store and ``resume`` is False.
        FingerprintError: it is the store of another run.
    """
    durable = durability == "power"
    content = encode_header(header)
    if root.exists() and not root.is_dir():
        raise StoreExistsError(f"{root} is a file: name a directory that does not exist yet")
    missing = [path for path in (root, *root.parents) if not path.exists()]
    for path in reversed(missing):
        disk.make_directory(path)
    # ranks that start together create the store once: the first under the directory's lock
    with disk.locked_directory(root):
        names = set(os.listdir(root))  # noqa: PTH208
        if HEADER_FILE not in names:
            if others := sorted(names - {_TMP_HEADER}):
                raise StoreExistsError(
                    f"{root} is not empty and no fisherscope store (it holds {others[0]!r}): name another "
                    "directory"
                )
            _write_header(root, content, durable=durable)
        elif not resume:
            raise StoreExistsError(
                f"{root} is a store already: resume it with resume=True, or name another directory"
            )
    stored, digest = read_header(root)
    check_identity(stored, header, root)
    for directory in (JOURNAL_DIRECTORY, SHARD_DIRECTORY, KEYS_DIRECTORY):
        disk.make_directory(root / directory)
    if durable:
        # always: whoever created these entries may have been killed before it could sync them
        disk.sync_path(root)
        for path in {root, *missing}:
            with contextlib.suppress(PermissionError):
                disk.sync_path(path.parent)
    return stored, digest


def _write_header(root: Path, content: bytes, *, durable: bool) -> None:
    tmp = root / _TMP_HEADER
    with disk.full_disk_named(tmp, len(content)):
        fd = disk.create(tmp)
        try:
            disk.write_at(fd, content, 0)
            if durable:
                disk.sync(fd)
        except BaseException:
            disk.unlink_quietly(tmp)
            raise
        finally:
            os.close(fd)
    disk.rename(tmp, root / HEADER_FILE)


def check_shards(root: Path, ledger: Ledger, durability: Durability) -> None:
    """Check that every shard that must exist does, with its size.

    A lost snapshot is forgotten instead, with a warning: its batches are computed again. With durability
    "power" the shards are synced as well: an earlier writer may have promised less.

    Raises:
        CorruptStoreError: samples or constants are missing.
    """
    snapshots = {snapshot.shard.file: task for task, snapshot in ledger.snapshots.items()}
    for shard in list(ledger.shards()):
        try:
            _check_shard(root, shard, durability)
        except CorruptStoreError as error:
            if shard.file not in snapshots:
                raise
            logger.warning("%s: the aggregate of task %r is begun again", error, snapshots[shard.file])
            del ledger.snapshots[snapshots[shard.file]]


def _check_shard(root: Path, shard: ShardRecord, durability: Durability) -> None:
    path = root / SHARD_DIRECTORY / shard.file
    try:
        fd = disk.open_inside(root, SHARD_DIRECTORY, shard.file)
    except FileNotFoundError:
        raise CorruptStoreError(f"{path} was committed and is missing: restore it from a copy") from None
    try:
        size = os.fstat(fd).st_size
        if durability == "power":
            disk.sync(fd)
    finally:
        os.close(fd)
    if size != shard.nbytes:
        raise CorruptStoreError(
            f"{path} has {size} bytes, {shard.nbytes} were committed: restore it from a copy"
        )


def remove_leftovers(root: Path, ledger: Ledger) -> None:
    """Remove the rank's temporary files, and its shards that no record commits (any more)."""
    kept = {shard.file for shard in ledger.shards()}
    ours = (tmp_prefix(ledger.rank), f"r{ledger.rank:04d}-")
    for directory in (SHARD_DIRECTORY, KEYS_DIRECTORY):
        for name in sorted(os.listdir(root / directory)):  # noqa: PTH208
            if name.startswith(ours) and name not in kept:
                disk.unlink(root / directory / name)
