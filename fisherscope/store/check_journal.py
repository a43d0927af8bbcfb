"""Reading journals that may be damaged: every line that is intact counts, and everything odd is said."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fisherscope.errors import CorruptStoreError
from fisherscope.store import disk, journal, keys
from fisherscope.store.index import build_index
from fisherscope.store.journal import MAX_JOURNAL_BYTES, Line, decode_line, journal_file
from fisherscope.store.keys import KEYS_DIRECTORY
from fisherscope.store.ledger import Ledger, latest, settle
from fisherscope.store.records import (
    ConstantsRecord,
    Record,
    SegmentRecord,
    SnapshotRecord,
    TaskRecord,
    decode,
    shard_name,
)
from fisherscope.store.schema import JOURNAL_DIRECTORY, SHARD_DIRECTORY
from fisherscope.store.verification import Finding

_RESTORE = "restore the journal from a copy"


@dataclass
class JournalCheck:
    """What a journal says, as far as it can be believed.

    Attributes:
        ledger: the intact lines, replayed.
        refused: records whose line is intact but contradicts those before it.
        lines: number of lines, intact or not, without a torn end.
        findings: what is wrong.
        notes: what a crash leaves.
        nbytes: size of the file.
    """

    ledger: Ledger
    refused: list[Record] = field(default_factory=list)
    lines: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    nbytes: int = 0

    def records(self) -> list[SegmentRecord | SnapshotRecord | ConstantsRecord]:
        """Every record whose shard must be there."""
        ledger = self.ledger
        live: list[Record] = [s for segments in ledger.segments.values() for s in segments.values()]
        live += ledger.snapshots.values()
        live += [ledger.constants] if ledger.constants else []
        shards = SegmentRecord | SnapshotRecord | ConstantsRecord
        known = [record for record in (*live, *self.refused) if isinstance(record, shards)]
        return list({record.shard.file: record for record in known}.values())


def check_journal(root: Path, rank: int, store_sha256: str) -> JournalCheck:
    """Read every line of a rank's journal and replay those that are intact."""
    check = JournalCheck(Ledger(rank, store_sha256))
    file = f"{JOURNAL_DIRECTORY}/{journal_file(rank)}"
    damaged: list[int] = []  # behind the last intact line, as far as is known
    try:
        for number, (content, ended) in enumerate(_lines(root, rank), 1):
            check.nbytes += len(content) + ended
            line = decode_line(content) if ended else None
            if line is None:
                damaged.append(len(content) + ended)
                continue
            for place in range(check.lines + 1, number):
                check.findings.append(Finding(file, f"line {place} is damaged: {_RESTORE}"))
            check.lines, damaged = number, []
            _replay(check, file, number, line)
    except (CorruptStoreError, OSError) as error:
        check.findings.append(Finding(file, str(error)))
        return check
    if len(damaged) == 1:
        check.notes.append(_torn(root, rank, check.lines, damaged[0]))
    elif damaged:
        # a crash tears one line, and the system may show zeros behind it
        message = f"{len(damaged)} lines from line {check.lines + 1} on are damaged: {_RESTORE}"
        check.findings.append(Finding(file, message))
    return check


def _lines(root: Path, rank: int) -> Iterator[tuple[bytes, bool]]:
    """The lines of a journal, each with whether a newline ends it; endless ones come in pieces."""
    with os.fdopen(disk.open_inside(root, JOURNAL_DIRECTORY, journal_file(rank)), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JOURNAL_BYTES:
            raise CorruptStoreError(f"it has {size} bytes, more than the {MAX_JOURNAL_BYTES} allowed")
        for piece in journal.pieces(file):
            ended = piece.endswith(b"\n")
            yield (piece[:-1] if ended else piece), ended


def _torn(root: Path, rank: int, lines: int, nbytes: int) -> str:
    shard = shard_name(rank, lines)
    there = os.path.lexists(root / SHARD_DIRECTORY / shard)
    state = "lies there: compare with a copy of the journal, resuming removes it" if there else "is not there"
    return (
        f"{JOURNAL_DIRECTORY}/{journal_file(rank)} ends with {nbytes} bytes that are no line: a commit that "
        f"did not happen, or damage to the last line. {shard}, which that line would commit, {state}"
    )


def _replay(check: JournalCheck, file: str, number: int, line: Line) -> None:
    ledger = check.ledger
    sequence = line.record.get("seq")
    if sequence != number - 1:
        message = f"line {number} has sequence number {sequence!r}: lines are missing or repeated; {_RESTORE}"
        check.findings.append(Finding(file, message))
    ledger.records = number - 1  # lines behind a damaged one count on
    record: Record | None = None
    try:
        record = decode(line.record, line.table, ledger.rank, number - 1)
        ledger.apply(record)
    except (ValueError, OverflowError) as error:
        check.findings.append(Finding(file, f"line {number} cannot be true: {error}; {_RESTORE}"))
        if record is not None:
            check.refused.append(record)


def check_agreement(root: Path, ledgers: Sequence[Ledger]) -> list[Finding]:
    """Check that the journals fit together and with the files of keys; drop snapshots that others hold."""
    names = list(dict.fromkeys(name for ledger in ledgers for name in ledger.tasks))
    findings: list[Finding] = []
    for name in names:
        wrong = list(_check_keys(root, latest(name, ledgers)))
        findings += wrong
        if any(finding.file.endswith(latest(name, ledgers).extents[-1].keys_sha256) for finding in wrong):
            continue
        try:
            alone = [_only(ledger, name) for ledger in ledgers]
            settle(root, alone)
            build_index(root, alone)
        except CorruptStoreError as error:
            findings.append(Finding(JOURNAL_DIRECTORY, str(error)))
    merged = set[str]().union(*(ledger.merged for ledger in ledgers))
    for ledger in ledgers:
        for task in [t for t, snapshot in ledger.snapshots.items() if snapshot.shard.file in merged]:
            del ledger.snapshots[task]
    return findings


def _check_keys(root: Path, task: TaskRecord) -> Iterator[Finding]:
    """The files of keys of a task, also those of what it was before it grew: a copy may need them."""
    for count, extent in enumerate(task.extents, 1):
        try:
            keys.check_keys_file(root, extent)
            keys.read_keys(root, task.extents[:count])
        except (CorruptStoreError, OSError) as error:
            yield Finding(f"{KEYS_DIRECTORY}/{extent.keys_sha256}", f"task {task.name!r}: {error}")


def _only(ledger: Ledger, task: str) -> Ledger:
    """What a rank says about one task; the others' troubles are told one by one."""
    return replace(
        ledger,
        tasks={name: record for name, record in ledger.tasks.items() if name == task},
        snapshots={name: record for name, record in ledger.snapshots.items() if name == task},
    )


def live_files(root: Path, store_sha256: str) -> set[str]:
    """Names of the shards that must be there now: a run that goes on replaces some."""
    checks = [check_journal(root, rank, store_sha256) for rank in journal.ranks(root)]
    check_agreement(root, [check.ledger for check in checks])
    return {record.shard.file for check in checks for record in check.records()}
