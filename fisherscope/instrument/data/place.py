"""Where a row stands, for the messages of errors; and a row that was read but not yet checked."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fisherscope.errors import DataError


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a row: its task, its 0-based number, and the file and line it was read from, if any."""

    task: str
    row: int
    source: str | None = None

    def __str__(self) -> str:
        origin = f"; {self.source}" if self.source else ""
        return f"sample {self.task}_{self.row} (row {self.row} of task {self.task!r}{origin})"

    def error(self, message: str) -> DataError:
        """The error for this row: ``raise place.error("...")``."""
        return DataError(f"{self}: {message}")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row before truncation; ``text`` is None where only ids were given, and so are parts it has not."""

    input_ids: list[int]
    labels: list[int]
    text: str | None
    token_types: list[int] | None = None
    pixels: Tensor | None = None
