"""Sums over many batches against sums in float64."""

import pytest
import torch

from fisherscope.linalg import Dense, Factored, OneByOne, Rows, RunningSum, Total
from fisherscope.linalg.scaling import LIMIT, as_float32, exponent_of, is_in_range

SHAPE = (6, 8)


def zeros():
    return RunningSum.zeros(*SHAPE, device=torch.device("cpu"))


def error(found, expected):
    """The largest relative error of any entry."""
    return float(((found - expected) / expected).abs().max())


def as_dense(generator, n):
    values = torch.rand(n, *SHAPE, generator=generator) + 0.5
    return Dense(values), values


def as_factored(generator, n):
    left = torch.rand(n, 2, SHAPE[0], generator=generator) + 0.5
    right = torch.rand(n, 2, SHAPE[1], generator=generator) + 0.5
    return Factored(left, right), left.mT @ right


def as_rows(generator, n):
    values = torch.rand(n * SHAPE[0], SHAPE[1], generator=generator) + 0.5
    sample = torch.arange(n).repeat_interleave(SHAPE[0])
    row = torch.arange(SHAPE[0]).repeat(n)
    return Rows(sample, row, values, n, SHAPE), values.view(n, *SHAPE)


def as_total(generator, n):
    first, one = as_factored(generator, n)
    second, other = as_dense(generator, n)
    return Total(first, second), one + other


def as_single(generator, n):
    _, values = as_dense(generator, n)
    return OneByOne(lambda i: values[i], n, SHAPE, torch.device("cpu")), values


KINDS = [as_dense, as_factored, as_rows, as_total, as_single]
MANY = [*KINDS[:4], pytest.param(as_single, marks=pytest.mark.slow)]


@pytest.mark.parametrize("make", MANY)
def test_100_000_samples_are_summed_to_1e_6(make):
    """F and mean over 10^5 samples are within 1e-6 of float64; sums in float32 alone are not."""
    generator = torch.Generator().manual_seed(0)
    n, batches = 32, 3125
    square, total = zeros(), zeros()
    naive = torch.zeros(SHAPE)
    exact_square, exact_total = (
        torch.zeros(SHAPE, dtype=torch.float64),
        torch.zeros(SHAPE, dtype=torch.float64),
    )
    for _ in range(batches):
        gradient, values = make(generator, n)
        gradient.accumulate(square=square, total=total)
        for value in values:
            naive.addcmul_(value, value)
        exact_square += values.double().square().sum(0)
        exact_total += values.double().sum(0)
    assert error(square.total(), exact_square) < 1e-6
    assert error(total.total(), exact_total) < 1e-6
    assert error(naive.double(), exact_square) > 2e-6


@pytest.mark.parametrize("make", KINDS)
def test_a_sum_goes_on_bit_by_bit(make):
    """What is stored and loaded goes on as if nothing had happened; without the compensation it does not."""

    def run(restart):
        generator = torch.Generator().manual_seed(1)
        into = zeros()
        for batch in range(60):
            make(generator, 5)[0].accumulate(square=into)
            if batch == 30:
                into = restart(into)
        return into

    def stored(into):
        again = zeros()
        assert again.load({k: v.clone() for k, v in into.arrays("x").items()}, "x") == 0
        return again

    plain, kept = run(lambda into: into), run(stored)
    assert torch.equal(plain.value, kept.value)
    assert torch.equal(plain.lost, kept.lost)
    assert plain.lost.any()
    torn = run(lambda into: RunningSum(into.value))
    assert not (torch.equal(plain.value, torn.value) and torch.equal(plain.lost, torn.lost))


def test_several_tiles_are_one_addition():
    """A parameter of many tiles, and samples that do not fit one: every row gets all samples."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(3, 700, 900, generator=generator)
    into, mean = (RunningSum.zeros(700, 900, device=torch.device("cpu")) for _ in range(2))
    for _ in range(2):
        Dense(values).accumulate(square=into, total=mean)
    torch.testing.assert_close(into.total(), 2 * values.double().square().sum(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean.total(), 2 * values.double().sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-12, 1e-4, 1.0, 1e10, 1e20, 3e38])
def test_every_float32_comes_into_the_range(size):
    """The power of two is a float32, and the square of what it gives is in the middle of the range."""
    exponent = exponent_of(size)
    assert abs(exponent) <= LIMIT
    assert torch.tensor(2.0**exponent, dtype=torch.float32).isfinite()
    square = (size * 2.0**exponent) ** 2
    assert 1e-18 < square < 1e26
    assert exponent == 0 or not is_in_range(size**2)


@pytest.mark.parametrize("size", [0.0, float("inf"), float("nan")])
def test_nothing_is_scaled_by_what_is_not_known(size):
    """No gradient, and none that is finite, leaves everything as it is."""
    assert exponent_of(size) == 0


def test_what_float32_cannot_hold_stays_in_float64():
    """Values below its normal numbers or beyond its largest one keep their digits; all others are float32."""
    for value, dtype in ((1e-37, torch.float32), (1e-39, torch.float64), (1e39, torch.float64)):
        found = as_float32(torch.tensor([0.0, 1.0, value], dtype=torch.float64))
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double()[2], torch.tensor(value, dtype=torch.float64), rtol=1e-7, atol=0
        )


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_bounds_are_of_the_magnitude_of_the_largest_entry(make, scale):
    """Never below it, and little above; 0 for a sample without any gradient; balancing changes no product."""
    gradient, values = make(torch.Generator().manual_seed(3), 4)
    factors = torch.tensor([1.0, 0.0, 1.0, 2.0]) * scale
    found = gradient.scaled(factors).bounds()
    largest = values.double().flatten(1).abs().amax(1) * factors.double()
    assert found.dtype == torch.float64
    assert found[1] == 0
    assert (found >= largest * (1 - 1e-6)).all()
    assert (found <= 4 * largest).all()
    for one in (gradient, gradient.scaled(factors)):
        torch.testing.assert_close(one.balanced().dense(), one.dense(), rtol=1e-6, atol=0)


def test_half_precision_holds_the_smallest_rows():
    """A row at the lower end of float32 keeps the digits that float16 has."""
    from fisherscope.linalg.rounding import from_half, to_half

    rows = torch.tensor([[3e-38, -1e-38, 7e-40], [2e-30, 1e-33, 0.0]])
    found = from_half(*to_half(rows, 1))
    largest = rows.double().abs().amax(1, keepdim=True)
    assert float(((found.double() - rows.double()) / largest).abs().max()) < 2**-11
