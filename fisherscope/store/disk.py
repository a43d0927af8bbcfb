"""Every system call that changes the disk, and the guarded ones that read it, in one place.

Nothing else in the room opens, writes, syncs, renames or removes a file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from fisherscope.errors import CorruptStoreError, StoreError, StoreFullError, StoreLockedError

Durability = Literal["power", "process", "none"]
DURABILITIES: tuple[Durability, ...] = ("power", "process", "none")

TMP_PREFIX = ".tmp-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_FULLSYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync does not reach the platter there

logger = logging.getLogger(__name__)


class NoSyncError(StoreError):
    """The file system has no means to wait until bytes are on the medium."""


@contextlib.contextmanager
def full_disk_named(path: Path, needed: int) -> Iterator[None]:
    """Turn "no space left" into an error that says how much was needed and how much there is.

    Raises:
        StoreFullError: the disk, a quota or a file-size limit is exhausted.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        try:
            free = free_bytes(path.parent)
        except OSError:
            free = 0
        raise StoreFullError(
            f"cannot write {path}: {needed} bytes ({needed / 1e9:.2f} GB) needed, {free} bytes "
            f"({free / 1e9:.2f} GB) free ({error.strerror}). What was committed is safe: free space and "
            "run the same command again, or collect into a new store with fewer parameters"
        ) from error


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write to the file system of ``directory``."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def create(path: Path) -> int:
    """Open a new file for reading and writing; what a crash left under the name is overwritten."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o644)


def allocate(fd: int, size: int) -> None:
    """Reserve ``size`` bytes, so that a full disk is found before anything is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
        return
    status = os.fstatvfs(fd)
    if status.f_bavail * status.f_frsize < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(fd, size)


def write_at(fd: int, data: Any, offset: int) -> None:
    """Write all bytes of a contiguous buffer at ``offset``."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def read_at(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill the buffer from ``offset``.

    Raises:
        OSError: the file ends before the buffer is full.
    """
    while buffer:
        got = os.preadv(fd, [buffer], offset)
        if not got:
            raise OSError(errno.EIO, "unexpected end of file")
        buffer = buffer[got:]
        offset += got


def sync(fd: int) -> None:
    """Wait until the file's bytes are on the medium.

    Raises:
        NoSyncError: the file system knows no such thing.
    """
    try:
        if _FULLSYNC is not None:
            fcntl.fcntl(fd, _FULLSYNC)
        else:
            os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        raise NoSyncError(
            f"the file system of the store cannot promise that anything outlives a loss of power "
            f"({error.strerror}): collect with durability='process' (--durability process), or onto another "
            "disk"
        ) from error


def sync_path(path: Path) -> None:
    """Wait until a file's bytes, or a directory's entries, are on the medium."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Give a file its final name, atomically."""
    os.rename(source, target)  # noqa: PTH104 - the system call by its name


def unlink(path: Path) -> None:
    """Remove a file; it may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108


def unlink_quietly(path: Path) -> None:
    """Remove a file where failing to is no error: the next writer to open the store removes it."""
    try:
        unlink(path)
    except OSError as error:
        logger.warning("could not remove %s: %s", path, error)


def make_directory(path: Path) -> None:
    """Create a directory; one that exists stays."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o755)  # noqa: PTH102


def lock(fd: int, path: Path) -> None:
    """Take the exclusive lock of an open file, which ends with its process.

    Raises:
        StoreLockedError: another process holds it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
            raise StoreLockedError(
                f"another process writes to {path}: wait until it ends, or collect into another directory"
            ) from None
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s cannot be locked (%s): let no second process write to this store", path, error)


@contextlib.contextmanager
def locked_directory(path: Path) -> Iterator[tuple[int, int]]:
    """Hold the lock of a directory, waiting for it, for a moment.

    Yields:
        Device and inode of the directory that is locked.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        status = os.fstat(fd)
        yield status.st_dev, status.st_ino
    finally:
        os.close(fd)


def is_locked(fd: int) -> bool:
    """Whether another process holds the lock of an open file; False where that cannot be known."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in {errno.EWOULDBLOCK, errno.EACCES}
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def open_inside(root: Path, *parts: str) -> int:
    """Open a file of the store for reading: a regular one, reached through no symbolic link.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptStoreError: it is a link, a device, a pipe or a directory.
    """
    common = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for index, part in enumerate(parts):
        flags = common | (os.O_DIRECTORY if index < len(parts) - 1 else 0)
        try:
            inner = os.open(part, flags, dir_fd=fd)
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENOTDIR, errno.EMLINK, errno.ENXIO}:
                raise _not_regular(root, parts) from None
            raise
        finally:
            os.close(fd)
        fd = inner
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _not_regular(root, parts)
    return fd


def _not_regular(root: Path, parts: tuple[str, ...]) -> CorruptStoreError:
    return CorruptStoreError(
        f"{root.joinpath(*parts)} is a symbolic link or not a regular file: a store holds regular files "
        "only. Copy the store with its files in place of links"
    )


def read_inside(root: Path, *parts: str, limit: int) -> bytes:
    """Read a whole file of the store.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptStoreError: it is not a regular file, or larger than ``limit`` bytes.
    """
    fd = open_inside(root, *parts)
    with os.fdopen(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > limit:
            raise CorruptStoreError(
                f"{root.joinpath(*parts)} has {size} bytes, more than the {limit} allowed"
            )
        return file.read(size)  # not more: so many bytes are allocated
