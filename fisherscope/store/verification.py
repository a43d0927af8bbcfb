"""What verifying a store found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fisherscope.words import counted


@dataclass(frozen=True)
class Finding:
    """One thing that is missing, damaged, or contradicts another.

    Attributes:
        file: path inside the store.
        message: what is wrong, and what to do.
        dataset: name of the damaged dataset, ``"metadata or padding"`` for the bytes of a shard that belong
            to none, None where the finding is about no bytes of a shard.
        start: first damaged byte, from the start of the file, as far as checksums can tell; None likewise.
        stop: end of the damaged bytes, exclusive.
    """

    file: str
    message: str
    dataset: str | None = None
    start: int | None = None
    stop: int | None = None

    def __str__(self) -> str:
        where = "" if self.start is None else f", bytes {self.start} to {self.stop}"
        which = "" if self.dataset is None else f", {self.dataset}"
        return f"{self.file}{which}{where}: {self.message}"


@dataclass(frozen=True)
class Verification:
    """The result of :func:`fisherscope.store.verify`.

    Attributes:
        path: the store.
        quick: whether the contents of shards were left unread.
        findings: what is wrong, file by file; empty where nothing is.
        notes: what an interrupted run has left behind, which is no damage.
        shards: number of committed shards that were looked at.
        nbytes: bytes that were read and compared.
    """

    path: str
    quick: bool
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    shards: int
    nbytes: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def summary(self) -> str:
        """The result in words: one line, then one per finding and note."""
        how = "names and sizes of" if self.quick else "all of"
        seen = f"{how} {counted(self.shards, 'shard')} looked at, {counted(self.nbytes, 'byte')} read"
        count = len(self.findings)
        verdict = "nothing is wrong" if self.ok else counted(count, "finding")
        lines = [f"{self.path}: {verdict} ({seen})"]
        lines += [f"  {finding}" for finding in self.findings]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``ok`` is among it."""
        return {"ok": self.ok, **asdict(self)}
