"""Files of rows: JSON lines, a JSON list, parquet; what a file is, its first bytes say."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

from fisherscope.errors import DataError
from fisherscope.instrument.data.forms import rows_of_frame
from fisherscope.instrument.data.jsonl import JsonlRow, read_jsonl

_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_OTHERS = {
    b"PK\x03\x04": "a zip archive",
    b"\xfd7zXZ": "compressed by xz",
    b"BZh": "compressed by bzip2",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"ARROW1": "an Arrow file",
    b"\x93NUMPY": "an array of numpy",
}
_TABLES = (".csv", ".tsv", ".xls", ".xlsx")


def read_task_file(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a task: JSON lines (also compressed by gzip), a JSON list of objects, or parquet.

    ``~`` stands for the home directory. What a file is, its content says, not its name.

    Returns:
        The rows in file order; each remembers the file and where it stood there.

    Raises:
        DataError: the file is missing, unreadable, or of another format; the message says what to do.
    """
    path = Path(path).expanduser()
    if "\0" in str(path) or not _is_encodable(str(path)):
        raise DataError(f"{str(path)!r} has characters that no file name has; name the file of the task")
    try:
        is_there, is_link = path.exists(), path.is_symlink()
    except OSError as error:  # a name that is too long, say
        raise DataError(f"{path}: {error.strerror}; name the file of the task") from error
    if is_link and not is_there:
        raise DataError(f"{path}: a link to {path.readlink()}, which does not exist; mend the link")
    if path.suffix.lower() in _TABLES and is_there:
        raise DataError(
            f"{path}: a table, whose columns have no types; read it with pandas and pass the frame, "
            'or write JSON lines with frame.to_json(path, orient="records", lines=True)'
        )
    try:
        # opened once: a pipe cannot be read twice
        handle = path.open("rb")
    except OSError:
        return read_jsonl(path)  # says what is wrong
    with handle:
        return _rows_of(path, handle)


def _is_encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _rows_of(path: Path, handle: BufferedReader) -> list[dict[str, Any]]:
    """The rows of an open file, by what its first bytes say that it is."""
    try:
        start = handle.peek(4096)
    except OSError:
        return read_jsonl(path)  # says what is wrong
    if start.startswith(_PARQUET):
        return _parquet(path, handle)
    for magic, what in _OTHERS.items():
        if start.startswith(magic):
            raise DataError(f"{path}: {what}; unpack it to a file with one JSON object per line")
    if start.startswith(_GZIP):
        return _unpacked(path, handle)
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        return _json_list(path, handle)
    return read_jsonl(path, handle)


def _unpacked(path: Path, packed: BufferedReader) -> list[dict[str, Any]]:
    try:
        with gzip.open(packed, "rb") as handle:
            return read_jsonl(path, handle)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip file is damaged or cut off ({error}); copy it again") from error


def _json_list(path: Path, handle: BufferedReader) -> list[dict[str, Any]]:
    content = handle.read()
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return read_jsonl(path, BytesIO(content))  # names the line
    if not values or not all(isinstance(value, dict) for value in values):
        return read_jsonl(path, BytesIO(content))
    return [JsonlRow(value, f"{path}, entry {number}") for number, value in enumerate(values)]


def _parquet(path: Path, handle: BufferedReader) -> list[dict[str, Any]]:
    try:
        import pandas as pd

        frame = pd.read_parquet(handle if handle.seekable() else BytesIO(handle.read()))
    except ImportError:
        raise DataError(
            f"{path}: a parquet file, which pandas reads with pyarrow: install it (pip install pyarrow), "
            "or give JSON lines"
        ) from None
    except Exception as error:  # each engine raises what it likes
        raise DataError(f"{path}: the parquet file cannot be read ({error}); write it again") from error
    rows: list[dict[str, Any]] = [
        JsonlRow(row, f"{path}, row {number}") for number, row in enumerate(rows_of_frame(frame) or ())
    ]
    if not rows:
        raise DataError(f"{path}: the file holds no rows; give it at least one")
    return rows
