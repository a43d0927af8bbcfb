"""Findings about what is stored: kept in the journal, read in order, no part of the store's identity."""

import math

import pytest

from fisherscope.errors import CorruptStoreError
from fisherscope.store import StoreWriter, open_store, verify
from fisherscope.store.journal import Line, encode_line
from tests.store.golden import header


def test_findings_come_back_in_order_and_by_kind(tmp_path):
    """What was handed in is read, from every rank, and a run goes on with such a store."""
    with StoreWriter.open(tmp_path / "run.fs", header()) as writer:
        writer.evidence("proof", {"largest": 1.5e-7, "batches": [0, 3]})
        writer.evidence("other", {"a": "b"})
    with StoreWriter.open(tmp_path / "run.fs", header()) as writer:
        writer.evidence("proof", {"largest": 2e-7, "batches": []})
    with StoreWriter.open(tmp_path / "run.fs", header(), rank=1) as writer:
        writer.evidence("proof", {"largest": 0})
    store = open_store(tmp_path / "run.fs")
    assert [found["largest"] for found in store.evidence("proof")] == [1.5e-7, 2e-7, 0]
    assert store.evidence("other") == [{"a": "b"}]
    assert store.evidence("nothing") == []
    assert verify(tmp_path / "run.fs").ok


@pytest.mark.parametrize(
    "values", [{"x": math.nan}, {"x": [1.0, math.inf]}, {"x": {"y": "\x1b[2J"}}, {"\x07": 1}]
)
def test_what_no_reader_would_take_is_not_written(tmp_path, values):
    """Numbers that are not finite, and texts that a terminal would obey."""
    with StoreWriter.open(tmp_path / "run.fs", header()) as writer:
        with pytest.raises(ValueError, match="values"):
            writer.evidence("proof", values)
        writer.evidence("proof", {"fine": True})
    assert open_store(tmp_path / "run.fs").evidence("proof") == [{"fine": True}]


def test_the_kind_of_a_finding_is_a_word(tmp_path):
    """A name that is no plain word is refused."""
    with (
        StoreWriter.open(tmp_path / "run.fs", header()) as writer,
        pytest.raises(ValueError, match="about"),
    ):
        writer.evidence("../x", {})


def test_a_forged_finding_is_refused_on_reading(tmp_path):
    """A matching line of a stranger is checked like any other."""
    with StoreWriter.open(tmp_path / "run.fs", header()):
        pass
    journal = tmp_path / "run.fs" / "journal" / "r0000.journal"
    count = len(journal.read_bytes().splitlines())
    forged = {"seq": count, "kind": "evidence", "about": "proof", "values": {"x": "\x1b[2J"}}
    with journal.open("ab") as file:
        file.write(encode_line(Line(forged, b"")))
    with pytest.raises(CorruptStoreError, match="do not print"):
        open_store(tmp_path / "run.fs")
