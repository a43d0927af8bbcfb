"""When to seal and when to take a snapshot: from what both have taken so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Pace:
    """How fast samples go by."""

    _samples: int = 0
    _seconds: float = 0.0

    def add(self, samples: int, seconds: float) -> None:
        """Some samples were done in so many seconds."""
        self._samples += samples
        self._seconds += seconds

    def seconds(self, samples: int) -> float:
        """How long so many will take; 0 before anything is known."""
        return samples * self._seconds / self._samples if self._samples else 0.0


@dataclass
class Cadence:
    """Spaces snapshots: they take a share of the time and of the bytes, unless too much work is at stake.

    Attributes:
        share: of the time and of the bytes that snapshots may take.
        most_seconds: after so long a snapshot is due whatever it weighs in bytes.
        size: bytes of a snapshot, as far as is known.
    """

    share: float
    most_seconds: float
    size: int
    _seconds: float = 0.0
    _bytes: int = 0
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self._at = time.monotonic()

    def is_due(self, bytes_written: int) -> bool:
        """Whether to take one now.

        Args:
            bytes_written: by the run so far, snapshots included.
        """
        since = time.monotonic() - self._at
        if since * self.share < self._seconds:
            return False
        others = bytes_written - self._bytes
        return self._bytes + self.size <= self.share * others or since >= self.most_seconds

    def taken(self, seconds: float, size: int) -> None:
        """A snapshot was taken.

        Args:
            seconds: that it took.
            size: its bytes.
        """
        self._seconds, self.size, self._at = seconds, size, time.monotonic()
        self._bytes += size
