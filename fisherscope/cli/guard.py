"""From exceptions to exit codes: one clear message, no traceback unless asked for."""

from __future__ import annotations

import functools
import logging
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TextIO

import typer
from typing_extensions import override

from fisherscope.cli.console import complain
from fisherscope.errors import FisherscopeError, Interrupted, UsageError

FAILED = 1
MISUSED = 2

P = ParamSpec("P")


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command so that it ends with a message and the right exit code whatever happens.

    The command has a ``debug`` option, which shows the traceback of expected errors too. Errors that nobody
    expected keep their traceback: they are bugs, and end with 1 as well.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        debug = bool(kwargs.get("debug"))
        with _plain_warnings(), _plain_logging():
            try:
                command(*args, **kwargs)
            except Interrupted as stop:
                _show(stop, "interrupted", debug=debug)
                raise typer.Exit(128 + stop.signal) from None
            except KeyboardInterrupt:
                complain(
                    "interrupted",
                    "stopped at once; a store keeps what was sealed, and the same command goes on",
                )
                raise typer.Exit(128 + signal.SIGINT) from None
            except UsageError as error:
                _show(error, "error", debug=debug)
                raise typer.Exit(MISUSED) from None
            except (FisherscopeError, OSError, RuntimeError) as error:
                if not _is_expected(error):
                    raise
                _show(error, "error", debug=debug)
                raise typer.Exit(FAILED) from None

    return run


def _is_expected(error: Exception) -> bool:
    """Whether the error speaks for itself: ours, of a file, or of a full GPU. A closed pipe is typer's."""
    # torch is not imported for the sake of its exception
    return (
        isinstance(error, FisherscopeError)
        or (isinstance(error, OSError) and not isinstance(error, BrokenPipeError))
        or type(error).__name__ == "OutOfMemoryError"
    )


def _show(error: Exception, label: str, *, debug: bool) -> None:
    if debug:
        sys.stderr.write("".join(traceback.format_exception(error)))
    step = "" if isinstance(error, FisherscopeError | OSError) else "; use a smaller --batch-size"
    complain(label, f"{str(error).rstrip('. ')}{step}" if step else str(error))


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings as sentences, without the file and line that raised them."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> Any:
        del category, filename, lineno, file, line
        complain("warning", str(message), color="yellow")

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


class _Complaints(logging.Handler):
    """Shows what the package logs as sentences on stderr."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        color = "red" if record.levelno >= logging.ERROR else "yellow"
        complain(record.levelname.lower(), record.getMessage(), color=color)


@contextmanager
def _plain_logging() -> Iterator[None]:
    logger, handler = logging.getLogger("fisherscope"), _Complaints(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
