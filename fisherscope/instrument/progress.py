"""A progress bar on a terminal, plain lines elsewhere, silence on request."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from fisherscope.telling import is_terminal, say
from fisherscope.words import counted

_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """Told about every finished batch."""

    def advance(self, task: str, samples: int, written: int) -> None:
        """``samples`` more samples of ``task`` are done, ``written`` bytes in all are in the store."""
        ...


@contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Progress]:
    """Progress over ``total`` samples, on stderr."""
    if quiet:
        yield _Silent()
        return
    if is_terminal():
        try:
            import rich.progress  # noqa: F401 - only to see whether it is there
        except ImportError:
            pass
        else:
            with _rich_bar(total) as bar:
                yield bar
            return
    lines = _Lines(total)
    yield lines
    lines.last()


class _Silent:
    def advance(self, task: str, samples: int, written: int) -> None:
        pass


class _Lines:
    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._written = 0
        self._begun = self._said = time.monotonic()

    def advance(self, task: str, samples: int, written: int) -> None:
        self._done += samples
        self._written = written
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            self._say(task)

    def last(self) -> None:
        if self._done:
            self._say("all tasks")

    def _say(self, task: str) -> None:
        rate = self._done / max(time.monotonic() - self._begun, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        say(
            f"collect {task}: {self._done}/{counted(self._total, 'sample')}, {rate:.1f} samples/s, "
            f"{self._written / 2**20:.1f} MiB, {left:.0f} s left\n"
        )


@contextmanager
def _rich_bar(total: int) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    class _Bar:
        def __init__(self, bars: RichProgress) -> None:
            self._bars = bars
            self._bar = bars.add_task("collect", total=total, rate="", size="")
            self._begun = time.monotonic()
            self._done = 0

        def advance(self, task: str, samples: int, written: int) -> None:
            self._done += samples
            rate = self._done / max(time.monotonic() - self._begun, 1e-9)
            self._bars.update(
                self._bar,
                advance=samples,
                description=f"collect {task}",
                rate=f"{rate:.1f} samples/s",
                size=f"{written / 2**20:.1f} MiB",
            )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[size]}"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        yield _Bar(bars)
