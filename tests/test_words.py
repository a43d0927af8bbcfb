"""Numbers with their nouns."""

import re
from pathlib import Path

import pytest

from fisherscope.words import counted, level, several

PACKAGE = Path(__file__).resolve().parent.parent / "fisherscope"


def test_one_is_no_plural():
    """Only 1 takes the singular; thousands have commas; irregular plurals are given."""
    assert [counted(n, "sample") for n in (0, 1, 2, 12000)] == [
        "0 samples", "1 sample", "2 samples", "12,000 samples",
    ]  # fmt: skip
    assert [counted(n, "batch", "batches") for n in (1, 2)] == ["1 batch", "2 batches"]
    assert [several(n, "is", "are") for n in (0, 1, 2)] == ["are", "is", "are"]


def test_levels_are_never_rounded_to_another_one():
    """99.5% is not "100%", and what floats add at their end is not shown."""
    assert [level(s) for s in (0.5, 0.995, 0.99999, 1 - 0.9, 0.95)] == [
        "50%",
        "99.5%",
        "99.999%",
        "10%",
        "95%",
    ]


@pytest.mark.parametrize("room", ["report", "analyses", "cli"])
def test_no_counted_noun_is_a_plural_by_hand(room):
    """In reports, summaries and on the command line every number with its noun goes through ``counted``."""
    nouns = "samples|pairs|slices|batches|tables|rows|heads|layers|parameters|groups|tokens|sentences|splits"
    plural = re.compile(rf"\{{(?:len\([^{{}}]*\)|[a-z_.]+)(?::,d?)?\}} (?:{nouns})\b")
    never_one = re.compile(r"pairs use the first|per-head")  # some of several samples; no number at all
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if plural.search(line) and not never_one.search(line)
    ]
    assert found == []
