"""How much memory there is, and how much of it one call of a reader may take."""

from __future__ import annotations

import contextlib
import operator
import os
import re
from pathlib import Path

from fisherscope.errors import MemoryBudgetError, UsageError
from fisherscope.words import counted

# what a call takes beside its result at most: stored bytes are brought into shape piece by piece
WORKING_BYTES = 64 << 20
PIECE_BYTES = 8 << 20

_SHARE = 0.5  # other programs need some, too
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_CGROUP = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def parse_bytes(text: str | int) -> int:
    """A number of bytes from a number or a text such as "8GB" or "500 MiB".

    Raises:
        ValueError: it is neither, or not positive.
    """
    if isinstance(text, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
        if match is None or match[2].upper() not in _UNITS:
            raise UsageError(
                f"{text!r} is no amount of memory: give bytes, or a text such as '8GB' or '500MiB'"
            )
        text = int(float(match[1]) * _UNITS[match[2].upper()])
    elif type(text) is not bool:
        with contextlib.suppress(TypeError):
            text = operator.index(text)
    if type(text) is not int or text < 1:
        raise UsageError(f"{text!r} is no amount of memory: give a positive number of bytes, or '8GB'")
    return text


def free_memory() -> int:
    """Free memory of the machine, or of the container that this runs in."""
    limits = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
        limits = [int(match[1]) * 1024] if match else limits
    except OSError:
        pass
    for limit, used in _CGROUP:
        try:
            limits.append(int(limit.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii")))
        except (OSError, ValueError):  # none, or no limit
            continue
    return max(min(limits, default=4 << 30), 0)


def budget_of(asked: int | str | None) -> int:
    """Bytes that a call may take: what was asked for, or half of what is free now.

    Raises:
        ValueError: it is no amount of memory.
    """
    return int(_SHARE * free_memory()) if asked is None else parse_bytes(asked)


def fitting(sample_bytes: int, budget: int) -> int:
    """How many samples a call may give back whose result takes so many bytes for each."""
    size = max(sample_bytes, 1)
    # a small result is worked on with no more than twice its own size
    return max(budget // (3 * size), (budget - WORKING_BYTES) // size, 0)


def refuse_beyond(budget: int, what: str, samples: int, sample_bytes: int) -> None:
    """Refuse a result that would not fit, before anything is allocated.

    Args:
        budget: bytes.
        what: the result, in words.
        samples: asked for.
        sample_bytes: of the result, for each.

    Raises:
        MemoryBudgetError: result and working memory exceed the budget.
    """
    if samples <= (most := fitting(sample_bytes, budget)):
        return
    hint = (
        f"samples=slice(0, {most}) fits, and of gradients store.stream() gives one piece after the other"
        if most
        else "not even one fits: read single heads with store.slice()"
    )
    raise MemoryBudgetError(
        f"{what} of {counted(samples, 'sample')} would take {samples * sample_bytes:,} bytes and up to "
        f"{min(WORKING_BYTES, 2 * samples * sample_bytes):,} to work with, and {budget:,} may be taken: "
        f"{hint}. open_store(path, memory_budget='8GB') sets the limit"
    )
