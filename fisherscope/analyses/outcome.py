"""What comes of running an analysis: its result, or why there is none."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Self

from fisherscope.analyses.result import Result
from fisherscope.errors import FisherscopeError


class SkipAnalysis(FisherscopeError):  # noqa: N818 - an answer, not a fault
    """Raised inside an analysis that cannot answer from this store; its message says what would help."""


@dataclass(frozen=True)
class Skipped:
    """The analysis did not run.

    Attributes:
        name: the analysis.
        reason: what is missing and how to get it.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} skipped: {self.reason}"


@dataclass(frozen=True)
class Failed:
    """The analysis raised an exception.

    Attributes:
        name: the analysis.
        error: type and text of the exception, one line.
        traceback: the full traceback as text.
    """

    name: str
    error: str
    traceback: str

    @classmethod
    def of(cls, name: str, error: BaseException) -> Self:
        """Record of an exception that was caught."""
        text = "".join(traceback.format_exception(error))
        return cls(name, f"{type(error).__name__}: {error}", text)

    def __str__(self) -> str:
        return f"{self.name} failed: {self.error}"


Outcome = Result | Skipped | Failed
