"""Verifying a store: every checksum, size and name, and what contradicts what. libhdf5 is not asked."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fisherscope.errors import CorruptStoreError
from fisherscope.store import disk, journal
from fisherscope.store.check_journal import JournalCheck, check_agreement, check_journal, live_files
from fisherscope.store.check_shard import check_shard, gone
from fisherscope.store.check_values import check_values
from fisherscope.store.keys import KEYS_DIRECTORY
from fisherscope.store.lifecycle import store_path
from fisherscope.store.schema import (
    HEADER_FILE,
    JOURNAL_DIRECTORY,
    MAX_HEADER_BYTES,
    SHARD_DIRECTORY,
    StoreHeader,
    read_header,
)
from fisherscope.store.token_texts import TOKENS_FILE, read_token_texts
from fisherscope.store.verification import Finding, Verification

_SHARD = re.compile(r"r([0-9]{4})-([0-9]{6,})\.h5")

Progress = Callable[[int, int], None]


def verify(path: str | Path, quick: bool = False, *, progress: Progress | None = None) -> Verification:
    """Check that everything that a store's journals commit is there and is what was committed.

    All is looked at, whatever was found before. A store that is being written may be verified, too. Memory
    holds the journals and 4 MiB of a shard.

    Args:
        path: the store.
        quick: only ``store.json``, ``tokens.json``, the journals, the files of keys, and that every shard is
            there with its size.
        progress: called now and then with the bytes of shards that were dealt with, and with all of them.

    Raises:
        StoreFormatError: the directory is not a store, or one of another format version.
    """
    root = store_path(path)
    # before the journals are read: what is there now they speak of then
    shards = _names(root / SHARD_DIRECTORY)
    header, digest, findings, nbytes = _check_header(root)
    checks, wrong = _check_journals(root, digest)
    findings += [*wrong, *_check_tokens(root)]
    nbytes += sum(check.nbytes for check in checks) + _size(root / TOKENS_FILE)
    nbytes += sum(_size(root / KEYS_DIRECTORY / name) for name in _keys(checks))
    records = [record for check in checks for record in check.records()]
    total, done = sum(record.shard.nbytes for record in records), 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    missing: dict[str, list[Finding]] = {}
    for record in records:
        found = check_shard(root, record.shard, quick=quick, tell=tell)
        nbytes += found.read
        if not found.there:
            missing[record.shard.file] = found.findings
            continue
        try:
            values = () if quick else check_values(root, record, header, found)
        except FileNotFoundError:  # replaced since its bytes were read
            missing[record.shard.file] = [gone(record.shard.file)]
            continue
        findings += [*found.findings, *values]
    if missing:
        live = live_files(root, digest)
        findings += (finding for file in missing.keys() & live for finding in missing[file])
    notes = [note for check in checks for note in check.notes]
    lost, debris = _unclaimed(root, shards, checks)
    findings += lost
    findings.sort(key=lambda finding: (finding.file, finding.start or 0))
    return Verification(str(root), quick, tuple(findings), (*notes, *debris), len(records), nbytes)


def _check_header(root: Path) -> tuple[StoreHeader | None, str, list[Finding], int]:
    """The header if it can be read, the digest of its file, what is wrong with it, and its size."""
    if not (root / JOURNAL_DIRECTORY).is_dir():
        read_header(root)  # says what the directory is
    try:
        # a store without it is one, if it has journals
        os.close(disk.open_inside(root, HEADER_FILE))
        header, digest = read_header(root)
    except FileNotFoundError:
        return None, "", [Finding(HEADER_FILE, "it is missing: restore it from a copy")], 0
    except (CorruptStoreError, OSError) as error:
        finding = Finding(HEADER_FILE, str(error))
    else:
        return header, digest, [], _size(root / HEADER_FILE)
    return None, _digest(root), [finding], 0


def _check_journals(root: Path, digest: str) -> tuple[list[JournalCheck], list[Finding]]:
    """The journals of all ranks, and what is wrong with them or contradicts itself in them."""
    before = journal.sizes(root)
    while True:
        checks = [check_journal(root, rank, digest) for rank in journal.ranks(root)]
        findings = [finding for check in checks for finding in check.findings]
        findings += check_agreement(root, [check.ledger for check in checks])
        # one that was read before another was written may contradict it
        before, known = journal.sizes(root), before
        if not findings or before == known:
            return checks, findings


def _keys(checks: Sequence[JournalCheck]) -> set[str]:
    """Names of the files of keys of all tasks, and of all that they once were."""
    tasks = (task for check in checks for task in check.ledger.tasks.values())
    return {extent.keys_sha256 for task in tasks for extent in task.extents}


def _check_tokens(root: Path) -> list[Finding]:
    """What is wrong with the texts of tokens, which a store may lack."""
    try:
        read_token_texts(root)
    except (CorruptStoreError, OSError) as error:
        return [Finding(TOKENS_FILE, str(error))]
    return []


def _digest(root: Path) -> str:
    try:
        return hashlib.sha256(disk.read_inside(root, HEADER_FILE, limit=MAX_HEADER_BYTES)).hexdigest()
    except (CorruptStoreError, OSError):
        return ""


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _unclaimed(
    root: Path, shards: Sequence[str], checks: Sequence[JournalCheck]
) -> tuple[list[Finding], list[str]]:
    """Files that no journal speaks of: what a crash leaves, and what only lost lines explain."""
    live = {record.shard.file for check in checks for record in check.records()}
    lines = {check.ledger.rank: check.lines for check in checks}
    lost: dict[int, list[str]] = {}
    notes: list[str] = []
    for name in shards:
        found = _SHARD.fullmatch(name)
        if name in live or not os.path.lexists(root / SHARD_DIRECTORY / name):
            continue
        # a crash leaves one shard that its journal does not commit, that of the next line; one that is
        # being committed just now looks the same
        if found and int(found[2]) > lines.get(int(found[1]), 0):
            lost.setdefault(int(found[1]), []).append(name)
        else:
            notes.append(_debris(SHARD_DIRECTORY, name))
    expected = {
        "": {HEADER_FILE, TOKENS_FILE, JOURNAL_DIRECTORY, SHARD_DIRECTORY, KEYS_DIRECTORY},
        JOURNAL_DIRECTORY: {journal.journal_file(rank) for rank in lines},
        KEYS_DIRECTORY: _keys(checks),
    }
    for directory, known in expected.items():
        notes += [_debris(directory, name) for name in _names(root / directory) if name not in known]
    findings = [
        Finding(
            f"{JOURNAL_DIRECTORY}/{journal.journal_file(rank)}",
            f"it has {lines.get(rank, 0)} lines, but {len(names)} shards lie there that only later lines can "
            f"have committed ({names[0]} is the first): lines are lost. Restore the journal from a copy",
        )
        for rank, names in lost.items()
    ]
    return findings, notes


def _debris(directory: str, name: str) -> str:
    place = f"{directory}/{name}" if directory else name
    if name.startswith(disk.TMP_PREFIX):
        what = "left by a run that was stopped; resuming removes it"
    elif _SHARD.fullmatch(name):
        what = "no journal commits it, or it was replaced; resuming removes it"
    elif directory == KEYS_DIRECTORY:
        what = "no journal speaks of it"
    else:
        what = "no part of the store"
    return f"{place!r}: {what}"


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))  # noqa: PTH208
    except OSError:
        return []
