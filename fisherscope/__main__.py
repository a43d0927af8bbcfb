"""The command ``fisherscope``, also as ``python -m fisherscope``.

Signals are looked after before anything slow is imported: who presses Ctrl-C in the first moment gets a
message and an exit code, too.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


class Stopped(BaseException):
    """A signal asked the program to stop. No library that handles Ctrl-C itself takes it for that.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind what is being done; in the middle of an import, which may not bear an exception, end at once."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _say(number)
            os._exit(128 + number)
        frame = frame.f_back
    raise Stopped(number)


def _say(number: int) -> None:
    sys.stderr.write(
        f"interrupted: {signal.Signals(number).name} stopped the command at once; a store keeps what was "
        "sealed, an earlier report stays, and the same command starts again\n"
    )
    sys.stderr.flush()


def main() -> None:
    """Entry point of the command ``fisherscope``."""
    stops = (signal.SIGINT, signal.SIGTERM)
    for number in stops:
        # a background job of a shell ignores Ctrl-C, and goes on doing so
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        from fisherscope.cli import run

        run()
    except Stopped as stop:
        for number in stops:
            signal.signal(number, signal.SIG_IGN)
        _say(stop.signal)
        sys.exit(128 + stop.signal)


if __name__ == "__main__":
    main()
