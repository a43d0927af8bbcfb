"""Moments of a stream are those of the whole, however it was split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fisherscope.linalg import Moments

ROWS = arrays.arrays(
    np.float64,
    st.tuples(st.integers(1, 30), st.integers(1, 3)),
    elements=st.floats(-1e3, 1e3, width=32),
)


def assert_equals_numpy(moments, rows):
    scale = np.abs(rows).max() + 1e-300
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12, atol=1e-12 * scale)
    expected = ((rows - rows.mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(moments.m2, expected, rtol=1e-10, atol=1e-12 * scale**2)
    assert moments.mean.dtype == moments.m2.dtype == np.float64


@given(ROWS, st.lists(st.integers(0, 30), max_size=4))
def test_any_split(rows, cuts):
    """Merging the parts in order equals numpy on the whole, empty parts included."""
    merged = Moments.empty(rows.shape[1])
    for part in np.split(rows, sorted(min(cut, len(rows)) for cut in cuts)):
        merged = merged.merge(Moments.of(part))
    assert_equals_numpy(merged, rows)


@given(ROWS, st.integers(0, 30))
def test_merging_is_symmetric(rows, cut):
    """Which of two ranks comes first changes rounding only."""
    first, second = Moments.of(rows[:cut]), Moments.of(rows[cut:])
    assert_equals_numpy(first.merge(second), rows)
    assert_equals_numpy(second.merge(first), rows)


def test_variance_is_unbiased():
    """Divided by n - 1; undefined, as NaN, for fewer than two vectors."""
    rows = np.random.default_rng(0).normal(size=(7, 3))
    np.testing.assert_allclose(Moments.of(rows).variance, rows.var(0, ddof=1), rtol=1e-12)
    assert np.isnan(Moments.of(rows[:1]).variance).all()
    assert np.isnan(Moments.empty(3).variance).all()


def test_no_cancellation():
    """A large mean with a small spread keeps its variance, where E[x^2] - E[x]^2 loses all digits."""
    rows = 1e8 + np.random.default_rng(0).normal(scale=1e-2, size=(1000, 1))
    merged = Moments.empty(1)
    for row in rows:
        merged = merged.merge(Moments.of(row[None]))
    np.testing.assert_allclose(merged.variance, rows.var(0, ddof=1), rtol=1e-3)
    naive = (rows**2).mean(0) - rows.mean(0) ** 2
    assert abs(naive / rows.var(0) - 1) > 1


def test_float32_input_is_summed_in_float64():
    """A million float32 values lose nothing to the accumulator."""
    rows = np.full((1_000_000, 1), 0.1, dtype=np.float32)
    assert Moments.of(rows).mean[0] == pytest.approx(float(np.float32(0.1)), rel=1e-13)


def test_merge_leaves_its_operands():
    """Snapshots are merged again and again on reading: nothing is changed in place."""
    first, second = Moments.of(np.ones((2, 1))), Moments.of(np.zeros((2, 1)))
    merged = first.merge(second)
    assert (first.mean[0], second.mean[0], merged.mean[0]) == (1, 0, 0.5)
    assert merged.m2[0] == 1
