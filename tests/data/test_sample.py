"""Samples: what they count and what tells them apart."""

from hypothesis import given
from hypothesis import strategies as st

from fisherscope.instrument.data import Sample

ids = st.lists(st.integers(0, 300), min_size=1, max_size=6)


def test_counts():
    """Position 0 bears no loss whatever its label: the causal shift drops it."""
    sample = Sample((5, 6, 7, 8), (5, -100, 7, 8))
    assert sample.length == 4
    assert sample.tokens == 2


@given(ids, ids, ids, ids)
def test_key_is_of_ids_and_labels(a, b, c, d):
    """Equal keys mean equal ids and labels, however they are divided between the two."""
    one, other = Sample(tuple(a), tuple(b)), Sample(tuple(c), tuple(d))
    assert (one.key == other.key) == (a == c and b == d)


def test_key_ignores_text_and_truncation_but_not_occurrence():
    """What does not change the gradient does not change the identity; a repetition is another sample."""
    plain = Sample((1, 2), (1, 2))
    assert Sample((1, 2), (1, 2), "text", 3).key == plain.key
    assert Sample((1, 2), (1, 2), occurrence=1).key != plain.key
    assert len(plain.key) == 32
    assert int(plain.key, 16) >= 0


def test_key_is_stable():
    """Keys are written into stores: the same sample has the same key in every version."""
    assert Sample((1, 2, 3), (-100, 2, 3)).key == "95df32ddfcf2596f3b18352487cc42c8"
