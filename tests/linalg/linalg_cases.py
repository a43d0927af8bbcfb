"""Random per-sample gradients with their reference in float64, and partitions of their parameter."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from fisherscope.layout import Partition
from fisherscope.linalg import Dense, Factored, OneByOne, PerSampleGradient, Rows, Total


@dataclass
class Case:
    """One gradient, what it must equal, and partitions of its parameter."""

    gradient: PerSampleGradient
    reference: torch.Tensor
    partitions: list[Partition | None]

    def __repr__(self):
        kind = type(self.gradient).__name__
        return f"{kind} {tuple(self.reference.shape)}, partitions {self.partitions}"


@st.composite
def partitions_of(draw, shape):
    """Pieces along any axis, in any order, with or without gaps; None for the whole parameter."""
    if draw(st.booleans()):
        return None
    axis = draw(st.integers(0, len(shape) - 1))
    width = draw(st.integers(1, shape[axis]))
    slots = shape[axis] // width
    order = draw(st.permutations(range(slots)))
    count = draw(st.integers(1, slots))
    offset = draw(st.integers(0, shape[axis] - slots * width))
    return Partition("p", shape, axis, tuple(offset + width * k for k in order[:count]), width)


def outer_products(left, right):
    """The gradients by definition, in float64: a loop over samples and positions."""
    reference = torch.zeros(left.shape[0], left.shape[2], right.shape[2], dtype=torch.float64)
    for i, (rows, columns) in enumerate(zip(left.double(), right.double(), strict=True)):
        for row, column in zip(rows, columns, strict=True):
            reference[i] += torch.outer(row, column)
    return reference


def make_factored(n, positions, shape, seed=0):
    """Random factors and their reference."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(n, positions, shape[0], generator=generator)
    right = torch.randn(n, positions, shape[1], generator=generator)
    return Factored(left, right), outer_products(left, right)


def make_dense(n, shape, seed=0):
    """Random values and their reference."""
    values = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    return Dense(values), values.double()


@st.composite
def factored_cases(draw):
    """Matrices as sums of one to six outer products."""
    shape = (draw(st.integers(1, 8)), draw(st.integers(1, 8)))
    made = make_factored(draw(st.integers(1, 4)), draw(st.integers(1, 6)), shape, draw(st.integers(0, 2**16)))
    return Case(*made, draw(st.lists(partitions_of(shape), min_size=1, max_size=3)))


@st.composite
def dense_cases(draw):
    """Parameters with one to three axes."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    made = make_dense(draw(st.integers(1, 4)), shape, draw(st.integers(0, 2**16)))
    return Case(*made, draw(st.lists(partitions_of(shape), min_size=1, max_size=3)))


def make_rows(n, positions, shape, seed=0):
    """Tokens, some of them equal and some left out, and the reference by a loop over them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, shape[0], (n, positions), generator=generator)
    gradient = torch.randn(n, positions, shape[1], generator=generator)
    reference = torch.zeros(n, *shape, dtype=torch.float64)
    for i in range(n):
        for t in range(positions):
            if ids[i, t] >= 0:
                reference[i, ids[i, t]] += gradient[i, t].double()
    return Rows.of_tokens(ids, gradient, shape[0]), reference


@st.composite
def rows_cases(draw):
    """Tables of which each sample touches at most six rows."""
    shape = (draw(st.integers(1, 8)), draw(st.integers(1, 5)))
    made = make_rows(draw(st.integers(1, 4)), draw(st.integers(1, 6)), shape, draw(st.integers(0, 2**16)))
    return Case(*made, draw(st.lists(partitions_of(shape), min_size=1, max_size=3)))


@st.composite
def total_cases(draw):
    """A table that is looked up and multiplied with, and used once more."""
    shape = (draw(st.integers(1, 8)), draw(st.integers(1, 5)))
    n, seed = draw(st.integers(1, 4)), draw(st.integers(0, 2**16))
    parts = [
        make_factored(n, draw(st.integers(1, 4)), shape, seed),
        make_rows(n, draw(st.integers(1, 4)), shape, seed + 1),
        make_dense(n, shape, seed + 2),
    ]
    chosen = draw(st.permutations(parts))[: draw(st.integers(2, 3))]
    reference = torch.stack([part for _, part in chosen]).sum(0)
    partitions = draw(st.lists(partitions_of(shape), min_size=1, max_size=3))
    return Case(Total(*(part for part, _ in chosen)), reference, partitions)


@st.composite
def lazy_cases(draw):
    """Gradients that are formed one sample at a time."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    dense, reference = make_dense(draw(st.integers(1, 4)), shape, draw(st.integers(0, 2**16)))
    lazy = OneByOne(lambda i: dense.values[i].clone(), dense.n, shape, dense.device)
    return Case(lazy, reference, draw(st.lists(partitions_of(shape), min_size=1, max_size=3)))


def any_case():
    """Any representation."""
    return st.one_of(factored_cases(), dense_cases(), rows_cases(), total_cases(), lazy_cases())


def per_piece(values, partitions):
    """Sum ``values [n, *shape]`` over each piece by slicing: for each partition ``[n, pieces]``."""
    results = []
    for partition in partitions:
        pieces = [values] if partition is None else [piece.take(values) for piece in partition]
        results.append(torch.stack([piece.flatten(1).sum(1) for piece in pieces], 1))
    return results


def assert_close(actual, expected, scale=None):
    """Float32 within 1e-5 of the reference, relative to its largest entry (or to ``scale``)."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    if expected.numel():
        scale = float(expected.abs().max() if scale is None else scale)
        assert float((actual.double() - expected).abs().max()) <= 1e-5 * max(scale, 1e-30)
