"""Creating a store's directory, and repairing what a crash left in it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from fisherscope.errors import CorruptStoreError, StoreError, StoreExistsError, UsageError
from fisherscope.store import disk
from fisherscope.store.disk import Durability
from fisherscope.store.journal import journal_file
from fisherscope.store.journal import read as read_journal
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
from fisherscope.store.token_texts import TOKENS_FILE

logger = logging.getLogger(__name__)

_LONGEST_NAME = 255
_TMP_HEADER = f"{disk.TMP_PREFIX}{HEADER_FILE}"


# what an operating system or a file server puts beside files, of which some never go away; hidden ones apart
_STRAYS = frozenset({"thumbs.db", "desktop.ini", "lost+found", "$recycle.bin", "@eadir"})


def store_path(path: str | Path) -> Path:
    """The directory of a store that a user names, whole: it stays when the working directory changes.

    Raises:
        ValueError: the path is empty, or no path.
        StoreError: a name in it is longer than file systems take.
    """
    if not isinstance(path, str | Path):
        raise UsageError(f"{path!r} is no path: name the directory of one store, such as 'run.fs'")
    if not str(path):
        raise UsageError("the path of a store is empty: name a directory, such as 'run.fs'")
    if not str(path).isprintable() and ("\0" in str(path) or not _is_encodable(str(path))):
        raise UsageError(f"{str(path)!r} has characters that no file name has: name another directory")
    whole = Path(path).expanduser().absolute()
    for part in whole.parts:
        if (size := len(os.fsencode(part))) > _LONGEST_NAME:
            raise StoreError(
                f"{part[:20]}... is a name of {size} bytes, and file systems take {_LONGEST_NAME}: choose a "
                "shorter one"
            )
    return whole


def _is_encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def is_stray(name: str) -> bool:
    """Whether a file is nobody's work: hidden, or what systems leave in directories."""
    return (name.startswith(".") and not name.startswith(disk.TMP_PREFIX)) or name.lower() in _STRAYS


def tmp_prefix(rank: int) -> str:
    """How the names of a rank's temporary files start."""
    return f"{disk.TMP_PREFIX}r{rank:04d}-"


def create_or_check(
    root: Path, header: StoreHeader, durability: Durability, *, resume: bool
) -> tuple[StoreHeader, str, bool]:
    """Create the store, or check that the store in ``root`` is of the same run.

    Returns:
        The header in the store, the sha256 of ``store.json``, and whether it was created here.

    Raises:
        StoreExistsError: the directory holds something else, or a store and ``resume`` is False.
        FingerprintError: it is the store of another run.
    """
    durable = durability == "power"
    content = encode_header(header)
    if root.exists() and not root.is_dir():
        raise StoreExistsError(f"{root} is a file: name a directory that does not exist yet")
    if root.is_symlink() and not root.exists():
        raise StoreExistsError(
            f"{root} is a link to {root.readlink()}, which does not exist: mend or remove it"
        )
    missing = [path for path in (root, *root.parents) if not path.exists()]
    # ranks that start together create the store once: the first under the directory's lock
    with _locked_root(root):
        names = set(os.listdir(root))  # noqa: PTH208
        created = HEADER_FILE not in names
        if created:
            if others := sorted(n for n in names - {_TMP_HEADER} if not is_stray(n)):
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
        disk.sync_path(root / HEADER_FILE)
        disk.sync_path(root)
        for path in {root, *missing}:
            with contextlib.suppress(PermissionError):
                disk.sync_path(path.parent)
    return stored, digest, created


@contextlib.contextmanager
def _locked_root(root: Path) -> Iterator[None]:
    """Make the directory where it is missing and hold its lock, of the very directory that has the name."""
    while True:
        for path in reversed([path for path in (root, *root.parents) if not path.exists()]):
            disk.make_directory(path)
        with disk.locked_directory(root) as identity:
            # one that began the store and failed may have removed it while this one waited
            if root.exists() and (root.stat().st_dev, root.stat().st_ino) == identity:
                yield
                return


def remove_if_empty(root: Path, rank: int) -> bool:
    """Take away a store without a sample that no other rank has joined; the caller holds the rank's lock.

    Returns:
        Whether it is gone. On any doubt it stays.
    """
    with disk.locked_directory(root):
        shards, journals = (sorted(os.listdir(root / d)) for d in (SHARD_DIRECTORY, JOURNAL_DIRECTORY))  # noqa: PTH208
        if journals != [journal_file(rank)]:
            return False
        lines = read_journal(root, rank).lines
        if any(line.record.get("kind") in {"segment", "snapshot"} for line in lines):
            return False
        committed = {line.record.get("shard") for line in lines}
        if any(not name.startswith(tmp_prefix(rank)) and name not in committed for name in shards):
            return False
        if any(is_stray(name) for name in os.listdir(root)):  # noqa: PTH208
            return False
        shutil.rmtree(root)
        return True


def sync_all(root: Path, ledger: Ledger) -> None:
    """Wait until everything that a rank has committed is on the medium."""
    for shard in ledger.shards():
        with contextlib.suppress(FileNotFoundError):  # a snapshot that was lost
            disk.sync_path(root / SHARD_DIRECTORY / shard.file)
    sync_keys(root, ledger)
    with contextlib.suppress(FileNotFoundError):  # not every store has it
        disk.sync_path(root / TOKENS_FILE)
    for path in (
        root / HEADER_FILE,
        *(root / d for d in (SHARD_DIRECTORY, KEYS_DIRECTORY, JOURNAL_DIRECTORY)),
    ):
        disk.sync_path(path)
    disk.sync_path(root)
    with contextlib.suppress(PermissionError):
        disk.sync_path(root.parent)


def sync_keys(root: Path, ledger: Ledger) -> None:
    """Wait until the keys of a rank's tasks are on the medium."""
    for task in ledger.tasks.values():
        disk.sync_path(root / KEYS_DIRECTORY / task.extents[-1].keys_sha256)
    disk.sync_path(root / KEYS_DIRECTORY)


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
    unfinished = tmp_prefix(ledger.rank)
    # copies that a file server or an editor has put beside shards are not ours to remove
    ours = re.compile(rf"r{ledger.rank:04d}-[0-9]{{6,}}\.h5")
    for directory in ("", SHARD_DIRECTORY, KEYS_DIRECTORY):
        for name in sorted(os.listdir(root / directory)):  # noqa: PTH208
            shard = directory == SHARD_DIRECTORY and ours.fullmatch(name)
            if (shard or name.startswith(unfinished)) and name not in kept:
                disk.unlink(root / directory / name)
