"""A partition is its slices, handled all at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherscope.layout import Partition

PARTITIONS = st.from_type(Partition)


@given(PARTITIONS)
def test_pieces_are_disjoint_slices_of_one_shape(partition):
    """Piece k starts where ``starts`` says; no entry belongs to two pieces."""
    owners = torch.zeros(partition.shape)
    for piece, start in zip(partition, partition.starts, strict=True):
        assert piece.slice_shape == partition.slice_shape
        assert piece.size == partition.slice_size
        assert piece.cuts[0].start == start
        piece.take(owners).add_(1)
    assert owners.max() == 1
    assert owners.sum() == len(partition) * partition.slice_size


@given(PARTITIONS, st.integers(0, 3))
def test_gather_is_the_slices_flattened(partition, n):
    """``gather`` gives ``[pieces, n, slice_size]``, each piece in the parameter's memory order."""
    values = torch.randn(n, *partition.shape)
    pieces = partition.gather(values)
    assert pieces.shape == (len(partition), n, partition.slice_size)
    for gathered, piece in zip(pieces, partition, strict=True):
        assert torch.equal(gathered, piece.take(values).flatten(1))


@given(PARTITIONS, st.integers(1, 3))
def test_scatter_undoes_gather_and_touches_nothing_else(partition, n):
    """What was gathered goes back where it came from; entries outside the pieces keep their values."""
    values = torch.randn(n, *partition.shape)
    background = torch.randn(n, *partition.shape)
    out = background.clone()
    partition.scatter(partition.gather(values), out)
    inside = torch.zeros(partition.shape, dtype=torch.bool)
    for piece in partition:
        piece.take(inside).fill_(True)
    assert torch.equal(out, torch.where(inside, values, background))


@given(PARTITIONS, st.lists(st.integers(1, 3), max_size=2))
def test_sums_are_those_of_the_slices(partition, leading):
    """Marginals along the axis, summed per piece, equal each slice's own sum."""
    marginals = torch.randint(-9, 10, (*leading, partition.shape[partition.axis])).float()
    sums = partition.sums(marginals)
    assert sums.shape == (*leading, len(partition))
    for k, start in enumerate(partition.starts):
        assert torch.equal(sums[..., k], marginals[..., start : start + partition.width].sum(-1))


def test_scatter_casts_to_the_target():
    """Pieces of a half-precision store are written to float32 gradients, adjacent or not."""
    for starts in [(0, 2), (2, 0)]:
        partition = Partition("p", (4, 3), 0, starts, 2)
        values = torch.arange(12.0).reshape(1, 4, 3)
        out = torch.zeros(1, 4, 3)
        partition.scatter(partition.gather(values).to(torch.bfloat16), out)
        assert torch.equal(out, values)


def test_gather_of_adjacent_pieces_of_rows_copies_nothing():
    """Heads side by side along axis 0 are read as views: a store writes them without another copy."""
    partition = Partition.regular("p", (6, 4), 0, 2, 3)
    values = torch.randn(1, 6, 4)
    assert partition.gather(values).untyped_storage().data_ptr() == values.untyped_storage().data_ptr()


def test_regular_with_an_offset():
    """The key heads of a fused projection start in the middle of the axis."""
    partition = Partition.regular("qkv", (4, 18), 1, 3, 2, offset=6)
    assert partition.starts == (6, 8, 10)
    assert len(partition) == 3
    assert partition.slice_shape == (4, 2)


@pytest.mark.parametrize(
    ("axis", "starts", "width", "message"),
    [
        (2, (0,), 1, "axis 2 does not exist"),
        (-1, (0,), 1, "axis -1 does not exist"),
        (0, (), 1, "at least one piece"),
        (0, (0,), 0, "at least one piece"),
        (0, (-1,), 2, "leave axis 0"),
        (0, (0, 3), 2, "leave axis 0"),
        (0, (2, 1), 2, "overlap"),
        (0, (1, 1), 1, "overlap"),
    ],
)
def test_impossible_partitions_are_refused(axis, starts, width, message):
    """Pieces lie within the parameter and do not overlap; the message names the parameter."""
    with pytest.raises(ValueError, match=message) as raised:
        Partition("layers.0.q", (4, 3), axis, starts, width)
    assert "'layers.0.q'" in str(raised.value)


@pytest.mark.parametrize("piece", [-1, 2])
def test_unknown_pieces_are_refused(piece):
    """A head that does not exist is an error, and never counts from the end."""
    with pytest.raises(IndexError, match="has 2 pieces, asked for"):
        Partition.regular("q", (4, 3), 0, 2, 2)[piece]
