"""JSON lines: what is read, and the file and line in every error."""

import pytest

from fisherscope.errors import DataError
from fisherscope.instrument.data import prepare_task, read_jsonl


def test_rows_in_order(tmp_path):
    """Blank lines, a byte order mark, Windows ends and a missing last newline do no harm."""
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xc3\xa9"}\r\n\n   \n{"text": "b\xe2\x80\xa8c"}')
    assert read_jsonl(path) == [{"text": "é"}, {"text": "b\u2028c"}]
    assert read_jsonl(str(path)) == read_jsonl(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": }\n', r"t\.jsonl, line 3: not valid JSON \(.* at column 10\)"),
        (b'{"text": "a"}\n[1, 2]\n', r"t\.jsonl, line 2: a JSON array, not an object"),
        (b"3\n", "line 1: a JSON number"),
        (b"null\n", "line 1: a JSON null"),
        (b'"text"\n', "line 1: a JSON string"),
        (b'{"a": 1}\n{"text": "\xff"}\n', "line 2: byte 11 is not UTF-8"),
        (b"[" * 100_000, "line 1: JSON nested too deeply"),
        (b"", "the file holds no rows"),
        (b"\n \n", "the file holds no rows"),
    ],
)
def test_unusable_files(tmp_path, content, message):
    """The message names the file, the line as an editor counts it, and the fault."""
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_jsonl(path)


def test_missing_file_and_directory(tmp_path):
    """Neither is a task."""
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        read_jsonl(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_jsonl(tmp_path)


def test_later_errors_name_the_line(tmp_path, characters):
    """A row that parses but cannot be used is found by its line, blank lines counted."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "ab"}\n\n{"foo": 1}\n')
    with pytest.raises(
        DataError, match=r"sample t_1 \(row 1 of task 't'; .*t\.jsonl, line 3\): unknown form"
    ):
        prepare_task("t", read_jsonl(path), characters)
