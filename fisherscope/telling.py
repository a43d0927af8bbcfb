"""Saying on stderr what long work is about: a line that is rewritten on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BEFORE_A_GUESS = 2.0


def say(text: str) -> None:
    """Write to stderr; where there is none, or it takes nothing any more, say nothing: a run goes on."""
    # None under pythonw; closed, a broken pipe, or an encoding without such characters
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text)


def is_terminal() -> bool:
    """Whether stderr is a terminal, where a line can be rewritten."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


class _Screen(Protocol):
    """Where steps are shown."""

    def now(self, text: str, *, begins: bool = False) -> None:
        """This is being done; ``begins``: from now on."""

    def done(self, text: str, *, outermost: bool) -> None:
        """This was done."""


class Steps:
    """Named steps of some work. They may lie inside each other; each is told with its own seconds."""

    def __init__(self, what: str, screen: _Screen) -> None:
        """Use :func:`steps`."""
        self._what, self._screen = what, screen
        self._names: list[str] = []
        self._inside = 0.0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step: told while it lasts, and with its seconds at the end, those of steps inside it apart."""
        begun, outside, self._inside = time.monotonic(), self._inside, 0.0
        self._names.append(name)
        self._screen.now(f"{self._what} {name}", begins=True)
        try:
            yield
        finally:
            took = time.monotonic() - begun
            self._names.pop()
            own = f"{self._what} {name}: {took - self._inside:.1f} s\n"
            self._screen.done(own, outermost=not self._names)
            self._inside = outside + took
            if self._names:
                self._screen.now(f"{self._what} {self._names[-1]}")

    def detail(self, text: str) -> None:
        """How far the present step is, such as ``pair 2 of 6``."""
        name = f" {self._names[-1]}" if self._names else ""
        self._screen.now(f"{self._what}{name}: {text}")


@contextmanager
def steps(what: str, total: int | None = None, *, quiet: bool, announce: bool = False) -> Iterator[Steps]:
    """Steps of some work, told on stderr.

    On a terminal one line is rewritten, with the time that has passed (where ``rich`` is there). Elsewhere
    there is a line at the end of each step, and one in the midst of it every ten seconds.

    Args:
        what: the work, in a word: "analyze".
        total: number of steps that do not lie inside another, where it is known.
        quiet: say nothing.
        announce: where there are lines, say each step when it begins, and not at its end.
    """
    if quiet:
        yield Steps(what, _Silent())
        return
    if is_terminal():
        try:
            import rich.progress  # noqa: F401 - only to see whether it is there
        except ImportError:
            pass
        else:
            with _rich_line(what, total) as screen:
                yield Steps(what, screen)
            return
    lines = _Lines(announce=announce)
    with lines.reminding():
        yield Steps(what, lines)


class _Silent:
    def now(self, text: str, *, begins: bool = False) -> None:
        pass

    def done(self, text: str, *, outermost: bool) -> None:
        pass


class _Lines:
    """Lines at the end of steps, or at their beginning, and reminders when nothing was said for long."""

    def __init__(self, *, announce: bool) -> None:
        self._announce = announce
        self._text = ""
        self._said = time.monotonic()

    def now(self, text: str, *, begins: bool = False) -> None:
        self._text = text
        if begins and self._announce:
            self._say(f"{text}\n")

    def done(self, text: str, *, outermost: bool) -> None:
        del outermost
        self._text = ""
        if not self._announce:
            self._say(text)

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        say(text)

    def _remind(self, stop: threading.Event) -> None:
        while not stop.wait(min(1.0, _SECONDS_BETWEEN_LINES)):
            if self._text and time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
                self._say(f"{self._text} ...\n")

    @contextmanager
    def reminding(self) -> Iterator[None]:
        """Say what is being done when nothing was said for long."""
        stop = threading.Event()
        thread = threading.Thread(target=self._remind, args=(stop,), name="fisherscope-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextmanager
def _rich_line(what: str, total: int | None) -> Iterator[_Screen]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    class _Line:
        def __init__(self, bars: Progress) -> None:
            self._bars = bars
            self._bar = bars.add_task(what, total=total)

        def now(self, text: str, *, begins: bool = False) -> None:
            del begins
            self._bars.update(self._bar, description=escape(text))

        def done(self, text: str, *, outermost: bool) -> None:
            del text
            if outermost:
                self._bars.update(self._bar, advance=1)

    columns: list[Any] = [TextColumn("{task.description}"), TimeElapsedColumn()]
    if total is not None:
        columns[1:1] = [BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield _Line(bars)


class Pace:
    """Says how long work of known extent will take, where that is long; else nothing."""

    def __init__(self, what: str, total: float, *, quiet: bool) -> None:
        """Begin.

        Args:
            what: the work, in a word.
            total: all of it, in any unit.
            quiet: say nothing.
        """
        self._what, self._total, self._quiet = what, total, quiet
        self._done = 0.0
        self._begun = self._said = time.monotonic()
        self._spoke = False

    def advance(self, work: float) -> None:
        """So much more is done."""
        self._done += work
        now = time.monotonic()
        passed = now - self._begun
        left = passed / self._done * (self._total - self._done) if self._done else 0.0
        first = not self._spoke and passed >= _SECONDS_BEFORE_A_GUESS and left >= _SECONDS_BETWEEN_LINES
        if self._quiet or not (first or (self._spoke and now - self._said >= _SECONDS_BETWEEN_LINES)):
            return
        self._spoke, self._said = True, now
        say(f"{self._what}: {self._done / self._total:.0%} done, about {left:.0f} s left\n")
