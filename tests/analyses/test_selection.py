"""Keeping exactly so many of the highest."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisherscope.analyses.selection import keep_count, keep_top, thresholds
from fisherscope.analyses.top import TopPairs

SCORES = st.lists(
    st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 1e-9, 1.0, 1.0000001, 3e38]), min_size=1, max_size=40
)


@given(SCORES, st.data())
def test_streamed_thresholds_keep_what_sorting_keeps(values, data):
    """Radix selection over any cut into stretches equals a stable sort: exact count, first ties stay."""
    scores = np.array(values, np.float32)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(scores)), max_size=3)))
    stretches = np.split(scores, cuts)
    keeps = data.draw(st.lists(st.integers(0, len(scores)), min_size=1, max_size=3))
    for keep, threshold in zip(keeps, thresholds(lambda: stretches, keeps), strict=True):
        seen, masks = 0, []
        for stretch in stretches:
            mask, seen = threshold.apply(stretch, seen)
            masks.append(mask)
        mask = np.concatenate(masks)
        assert mask.sum() == keep
        np.testing.assert_array_equal(mask, keep_top(scores.astype(float), keep))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_scores_that_are_no_fisher_values_are_refused(bad):
    """NaN, infinity and negative values cannot be ranked."""
    with pytest.raises(ValueError, match="finite and not negative"):
        thresholds(lambda: [np.array([1.0, bad], np.float32)], [1])


@pytest.mark.parametrize(("total", "sparsity", "keep"), [(80, 0.9, 8), (10, 0.7, 3), (5, 0.5, 2), (3, 0, 3)])
def test_counts_are_exact_despite_binary_fractions(total, sparsity, keep):
    """0.9 of 80 removes 72; halves are removed."""
    assert keep_count(total, sparsity) == keep


def test_masks_are_nested():
    """What a sparser mask keeps, a denser one keeps too, ties included."""
    scores = np.array([1.0, 2, 2, 2, 0, 5])
    masks = [keep_top(scores, k) for k in range(7)]
    for small, large in pairwise(masks):
        assert (small <= large).all()
    np.testing.assert_array_equal(masks[2], [False, True, False, False, False, True])


@given(st.integers(1, 12), st.integers(0, 3))
def test_top_pairs_equal_a_sort_of_everything(k, seed):
    """Streaming in stretches of rows and columns finds the same pairs as sorting all, ties in order."""
    rng = np.random.default_rng(seed)
    matrices = rng.integers(0, 5, (3, 6, 7)).astype(float)
    matrices[0, 0, 0] = np.nan
    top = TopPairs(k)
    for label, matrix in enumerate(matrices):
        for rows in (slice(0, 2), slice(2, 6)):
            for columns in (slice(0, 3), slice(3, 7)):
                top.offer(matrix[rows, columns], label, first_row=rows.start, first_column=columns.start)
    ranked = sorted(
        (-matrices[place], place) for place in np.ndindex(matrices.shape) if not np.isnan(matrices[place])
    )[:k]
    assert top.scores.tolist() == [-score for score, _ in ranked]
    assert [tuple(place) for place in top.places] == [place for _, place in ranked]
