"""System calls that are numbered, fail or kill: stand-ins for those of ``os``, in the store's code alone.

What other libraries call is left alone: the n-th call is a call of the store, in whichever thread it is made.
"""

import functools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

CALLS = ("open", "mkdir", "posix_fallocate", "pwrite", "fsync", "rename", "unlink", "ftruncate", "preadv")
TAKES_SPACE = ("mkdir", "posix_fallocate", "pwrite")
STORE = "fisherscope.store"


@dataclass(frozen=True)
class Call:
    """One call that the store makes.

    Attributes:
        number: counted from 1.
        name: of the function of ``os``.
        real: what it would do.
    """

    number: int
    name: str
    real: Callable[..., Any]
    args: tuple
    options: dict

    def go(self) -> Any:
        return self.real(*self.args, **self.options)


class Calls:
    """Stand-ins for system calls, which ask an action what to do; ``names`` are those seen so far."""

    def __init__(self, patch, action: Callable[[Call], Any] = Call.go, names: Iterable[str] = CALLS):
        self.names: list[str] = []
        self._action = action
        self._lock = threading.Lock()
        for name in names:
            patch.setattr(os, name, self._stand_in(name, getattr(os, name)))

    def _stand_in(self, name, real):
        @functools.wraps(real)
        def call(*args, **options):
            if not sys._getframe(1).f_globals.get("__name__", "").startswith(STORE):
                return real(*args, **options)
            with self._lock:
                self.names.append(name)
                number = len(self.names)
            return self._action(Call(number, name, real, args, options))

        return call


def killed_at(k: int) -> Callable[[Call], Any]:
    """SIGKILL at call k; half of the bytes of a write arrive."""

    def act(call: Call) -> Any:
        if call.number != k:
            return call.go()
        if call.name == "pwrite":
            fd, data, offset = call.args
            call.real(fd, memoryview(data)[: max(1, len(data) // 2)], offset)
        os.kill(os.getpid(), signal.SIGKILL)
        return threading.Event().wait()  # the other threads may run on for a moment

    return act


class FailingAt:
    """An error at call k, and with ``lasting`` at every later call that takes space too.

    Attributes:
        seen: names of the calls that failed.
    """

    def __init__(self, k: int, number: int, *, lasting: bool = False):
        self.seen: list[str] = []
        self._k, self._number, self._lasting = k, number, lasting

    def __call__(self, call: Call) -> Any:
        again = self._lasting and call.number > self._k and call.name in TAKES_SPACE
        if call.number != self._k and not again:
            return call.go()
        self.seen.append(call.name)
        raise OSError(self._number, os.strerror(self._number))


def in_a_fork(patch_and_run: Callable[[], None]) -> int:
    """Run something in a forked child, which prints nothing; its status as from ``waitpid``."""
    return os.waitpid(fork(patch_and_run), 0)[1]


def fork(run: Callable[[], object]) -> int:
    """Begin something in a forked child, which prints nothing, and return the child's id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child runs no other thread's code
        child = os.fork()
    if not child:
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    return child


def was_killed(status: int) -> bool:
    """Whether a child ended by SIGKILL; any other end but a clean one is an error."""
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False
