"""float16 with a power of two as scale of each row: 11 bits of every value, however small."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherscope.linalg.rounding import from_half, rounded, row_scales, to_half


@given(st.integers(-120, 120), st.integers(0, 2**16))
def test_half_a_unit_in_the_last_place(exponent, seed):
    """Any magnitude of a row: the error of each value down to 2 ** -29 of the largest is 2 ** -12 of it."""
    values = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values *= 2.0**exponent
    half, scales = to_half(values, 1)
    found = half.double() * scales.double().unsqueeze(1)
    assert float(half.abs().max()) <= 2**15
    assert torch.equal(torch.frexp(scales)[0], torch.full((4,), 0.5))
    assert float(((found - values).abs() / values.abs().clamp_min(1e-300)).max()) <= 2**-11


def test_rows_of_different_size_do_not_disturb_each_other():
    """Rows 20 orders of magnitude apart, and one of zeros."""
    values = torch.tensor([[1e20, -3e19], [2e-20, 1e-21], [0.0, 0.0]])
    half, scales = to_half(values, 1)
    assert torch.allclose(from_half(half, scales), values, rtol=2**-11)
    assert scales[2] == 1
    assert not half[2].any()


def test_nothing_but_zero_becomes_zero():
    """The smallest float32 beside nothing larger, and values down to 2 ** -39 of the largest of a row."""
    tiny = torch.tensor([[1e-45, 0.0], [1.0, 2.0**-39]])
    assert ((rounded(tiny, "float16", 1) != 0) == (tiny != 0)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounding_twice_is_rounding_once(dtype):
    """What a store gives back can be stored again unchanged: also where rounding reaches a power of two."""
    values = torch.randn(50, 8)
    values[0] = torch.tensor([32767.99, 1e-3, 5e-6, 1.0, 2.0, 3.0, 1e-8, 16383.999])
    once = rounded(values, dtype, 1)
    assert torch.equal(rounded(once, dtype, 1), once)


def test_rows_may_have_several_axes():
    """One scale for what the last axes hold together."""
    values = torch.randn(3, 2, 4, 5)
    assert row_scales(values, 2).shape == (3, 2)
    assert torch.allclose(rounded(values, "float16", 2), values, rtol=2**-11)
    assert row_scales(torch.zeros(3, 0), 1).tolist() == [1, 1, 1]
