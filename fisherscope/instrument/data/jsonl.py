"""Reading JSON lines, with the file and the line number in every error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from fisherscope.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 64 << 20


class Readable(Protocol):
    """Something to read lines from, compressed or not."""

    def readline(self, size: int, /) -> bytes:
        """The next line, or so many bytes of it."""


class JsonlRow(dict[str, Any]):
    """A row that knows where it was read: a dict with ``source``, such as ``"math.jsonl, line 7"``."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        super().__init__(values)
        self.source = source


def read_jsonl(path: str | Path, file: Readable | None = None) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line; blank lines are skipped.

    Args:
        path: the file.
        file: what to read its lines from, where it is open already or compressed.

    Returns:
        The objects in file order. Each remembers its file and line, so that later errors can name them.

    Raises:
        DataError: the file is missing, empty or unreadable, or a line is not UTF-8, not JSON, or not an
            object; the message names the file and the 1-based line.
    """
    path = Path(path).expanduser()
    try:
        if file is not None:
            rows = _rows(path, _lines(path, file))
        else:
            with path.open("rb") as handle:
                rows = _rows(path, _lines(path, handle))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a task is a file with one JSON object per line") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); give a readable JSONL file"
        ) from error
    if not rows:
        raise DataError(f"{path}: the file holds no rows; write one JSON object per line")
    return rows


def _lines(path: Path, file: Readable) -> Iterator[bytes]:
    """The lines of a file, none of which takes more memory than a row may: a device has no end."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise DataError(
                f"{path}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB; each line must be one row"
            )
        yield line


def _rows(path: Path, lines: Iterable[bytes]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        raw = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if raw.strip():
            source = f"{path}, line {number}"
            rows.append(JsonlRow(_parse(raw, source), source))
    return rows


def _parse(raw: bytes, source: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}: not valid JSON ({error.msg} at column {error.colno}); "
            "each line must be one whole JSON object"
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{source}: {error}; write numbers that a model can use") from error
    except RecursionError as error:
        raise DataError(f"{source}: JSON nested too deeply to read; flatten the row") from error
    if not isinstance(value, dict):
        raise DataError(
            f"{source}: a JSON {_json_type(value)}, not an object; "
            'each line must look like {"text": ...} or {"prompt": ..., "completion": ...}'
        )
    return value


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return names.get(type(value), type(value).__name__)
