"""Files that appear together: all are written beside their places first, then put there."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

# The process that writes is in the name, so that what a killed one left is told from what another one writes.
_PREFIX = ".fisherscope-"
_OURS = re.compile(r"\.fisherscope-(\d+)-.*\.tmp")
# What former versions wrote under, file by file.
_FORMER = re.compile(r"\.(report\.html|results\.json|.+\.(csv|jsonl))\.[a-z0-9_]{8}\.tmp")


def put(directory: Path, files: Mapping[str, str]) -> None:
    """Write files into a directory that exists: none of them takes its place before all are written.

    Characters that are no text (halves of surrogate pairs) are written as escapes.

    Args:
        directory: where.
        files: path below it -> content; its folders are made.

    Raises:
        OSError: a file cannot be written; those that were there are as they were.
    """
    contents = {name: text.encode("utf-8", errors="backslashreplace") for name, text in files.items()}
    for name in files:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        if (directory / name).is_dir():
            raise IsADirectoryError(f"{directory / name} is a directory, and a file is to be written there")
    clean(directory)
    place = Path(tempfile.mkdtemp(dir=directory, prefix=f"{_PREFIX}{os.getpid()}-", suffix=".tmp"))
    try:
        written = []
        for number, (name, content) in enumerate(contents.items()):
            written.append((place / str(number), directory / name))
            written[-1][0].write_bytes(content)
        for source, target in written:
            source.replace(target)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def clean(directory: Path) -> None:
    """Remove what a process that was killed left under temporary names, in a directory and its tables."""
    for folder in (directory, directory / "tables"):
        for path in folder.glob(".*.tmp") if folder.is_dir() else ():
            ours = _OURS.fullmatch(path.name)
            if ours and path.is_dir() and not _runs(int(ours[1])):
                shutil.rmtree(path, ignore_errors=True)
            elif _FORMER.fullmatch(path.name) and path.is_file():
                with suppress(OSError):
                    path.unlink()


def is_left_over(path: Path) -> bool:
    """Whether a file or directory has a name that is only used while a report is written."""
    return bool(_OURS.fullmatch(path.name) or _FORMER.fullmatch(path.name))


def _runs(process: int) -> bool:
    """Whether there is another process of that number; this one has written nothing yet."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
