"""A slice is index data: it cuts views out of whatever ends in the parameter's axes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherscope.layout import Cut, ParameterSlice


@st.composite
def slices(draw):
    """Up to one cut per axis, possibly strided."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    cuts = []
    for axis, length in enumerate(shape):
        if draw(st.booleans()):
            start = draw(st.integers(0, length - 1))
            stop = draw(st.integers(start + 1, length))
            cuts.append(Cut(axis, start, stop, draw(st.integers(1, 3))))
    return ParameterSlice("p", shape, tuple(draw(st.permutations(cuts))))


def entries(piece):
    """The flat positions of the slice within the parameter, by the definition."""
    keep = [range(n) for n in piece.shape]
    for cut in piece.cuts:
        keep[cut.axis] = range(cut.start, cut.stop, cut.step)
    positions = torch.arange(int(torch.tensor(piece.shape).prod())).reshape(piece.shape)
    for axis, indices in enumerate(keep):
        positions = positions.index_select(axis, torch.tensor(list(indices)))
    return positions


@given(slices(), st.lists(st.integers(1, 3), max_size=2))
def test_take_cuts_the_entries_and_keeps_leading_axes(piece, leading):
    """The same slice cuts a weight, a stack of gradients, anything that ends in the parameter's axes."""
    flat = entries(piece)
    assert piece.slice_shape == flat.shape
    assert piece.size == flat.numel()
    tensor = torch.randn(*leading, *piece.shape)
    whole = tensor.flatten(len(leading))
    expected = whole[..., flat.reshape(-1)].reshape(*leading, *piece.slice_shape)
    assert torch.equal(piece.take(tensor), expected)


@given(slices())
def test_take_is_a_view(piece):
    """Writing through a slice changes exactly its entries of the tensor: nothing is copied."""
    tensor = torch.zeros(2, *piece.shape)
    view = piece.take(tensor)
    assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    view += 1
    expected = torch.zeros(tensor[0].numel())
    expected[entries(piece).reshape(-1)] = 1
    assert torch.equal(tensor, expected.reshape(piece.shape).expand_as(tensor))


def test_a_slice_without_cuts_is_the_parameter():
    """No cut keeps everything; a parameter may have no axes at all."""
    tensor = torch.randn(3, 4)
    assert torch.equal(ParameterSlice("p", (3, 4), ()).take(tensor), tensor)
    assert ParameterSlice("scale", (), ()).take(torch.randn(5)).shape == (5,)
    assert ParameterSlice("scale", (), ()).size == 1


@pytest.mark.parametrize("shape", [(4, 3), (3,), (3, 4, 1), ()])
def test_take_refuses_another_shape(shape):
    """A tensor of another shape is an error that names the parameter and both shapes, not a wrong cut."""
    piece = ParameterSlice("layers.0.q", (3, 4), (Cut(0, 0, 1),))
    with pytest.raises(ValueError, match=r"'layers\.0\.q'.*\(3, 4\)"):
        piece.take(torch.zeros(shape))


@pytest.mark.parametrize("arguments", [(-1, 0, 1), (0, -1, 1), (0, 2, 2), (0, 3, 2), (0, 0, 1, 0)])
def test_cuts_that_keep_nothing_are_refused(arguments):
    """A cut keeps at least one index and goes forwards."""
    with pytest.raises(ValueError, match="not a valid cut"):
        Cut(*arguments)


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ((Cut(0, 0, 4),), "does not fit"),
        ((Cut(2, 0, 1),), "does not fit"),
        ((Cut(1, 0, 1), Cut(1, 2, 3)), "two cuts along one axis"),
    ],
)
def test_slices_that_leave_the_parameter_are_refused(cuts, message):
    """A slice lies within its parameter, with one cut per axis."""
    with pytest.raises(ValueError, match=message):
        ParameterSlice("p", (3, 4), cuts)
