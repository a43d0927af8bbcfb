"""Truncated gradients are the best of their rank, and say how good they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherscope.layout import Cut, ParameterSlice
from fisherscope.linalg import Dense, Factored, LowRank
from fisherscope.linalg.rounding import rounded
from tests.linalg.linalg_cases import assert_close, factored_cases, make_dense, make_factored, rows_cases


def by_svd(reference, rank):
    """The best approximation and its relative error, by a full decomposition in float64."""
    u, s, vh = torch.linalg.svd(reference, full_matrices=False)
    best = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
    square = reference.square().sum((1, 2))
    error = (s[..., rank:].square().sum(1) / square.clamp_min(1e-300)).sqrt()
    return best, torch.where(square > 0, error, torch.zeros_like(error))


@given(st.one_of(factored_cases(), rows_cases()), st.integers(1, 9))
def test_it_is_the_best_of_its_rank(case, rank):
    """As near as a full singular value decomposition gets, in each sample, with that as recorded error."""
    found = LowRank.of(case.gradient, rank)
    assert (found.rank, found.n, found.shape) == (rank, case.gradient.n, case.gradient.shape)
    reference = case.reference
    _, error = by_svd(reference, rank)
    norms = reference.flatten(1).norm(dim=1)
    actual = (found.dense().double() - reference).flatten(1).norm(dim=1) / norms.clamp_min(1e-300)
    assert torch.allclose(actual[norms > 0], error[norms > 0], atol=1e-5)
    assert torch.allclose(found.error.double(), error, atol=1e-6)


@pytest.mark.parametrize("positions", [3, 40])
def test_both_ways_give_the_same(positions):
    """Few positions go through a small matrix between bases, many through the gradient itself."""
    gradient, reference = make_factored(3, positions, (12, 20))
    best, error = by_svd(reference, 2)
    for made in (gradient, Dense(reference.float())):
        found = LowRank.of(made, 2)
        assert_close(found.dense(), best)
        assert torch.allclose(found.error.double(), error, atol=1e-6)


def test_full_rank_is_exact():
    """As many terms as positions give the gradient back, and the error is that of rounding alone."""
    gradient, reference = make_factored(2, 4, (9, 7))
    found = LowRank.of(gradient, 4)
    assert_close(found.dense(), reference)
    assert float(found.error.max()) <= 1e-6


def test_small_singular_values_keep_their_digits():
    """Values that a Gram matrix in float32 would lose: 1 and 1e-4, whose squares are 8 digits apart."""
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    reference = (q[:, :3] * torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64)) @ q[:, 3:].T
    gradient = Factored((q[:, :3] * 1.0).T[None].float(), (reference.T @ q[:, :3]).T[None].float())
    assert float(LowRank.of(gradient, 2).error[0]) == pytest.approx(1e-4, rel=1e-2)
    assert float(LowRank.of(gradient, 1).error[0]) == pytest.approx(1e-2, rel=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_error_is_that_of_what_is_kept(dtype):
    """Rounding is part of it: measured against the rounded factors, in float64."""
    gradient, reference = make_factored(4, 5, (30, 24))
    for rank in (1, 3, 5):
        found = LowRank.of(gradient, rank, lambda rows: rounded(rows, dtype, 1))
        kept = found.left.double().mT @ found.right.double()
        actual = (kept - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
        assert torch.allclose(found.error.double(), actual, rtol=1e-4, atol=2e-7)
        assert torch.equal(found.left, rounded(found.left, dtype, 1))


def test_a_gradient_of_zero():
    """It has no error, not one of nothing divided by nothing."""
    gradient = Factored(torch.zeros(2, 3, 4), torch.ones(2, 3, 5))
    found = LowRank.of(gradient, 2)
    assert found.error.tolist() == [0.0, 0.0]
    assert not found.dense().any()


def test_it_is_a_factored_gradient():
    """Norms, inner products and slices are those of the approximation; a scale leaves relative errors."""
    gradient, _ = make_factored(3, 6, (8, 5))
    found = LowRank.of(gradient, 2)
    kept = found.dense().double()
    assert_close(found.norms([None])[0][:, 0], kept.square().sum((1, 2)))
    assert_close(found.gram(), kept.flatten(1) @ kept.flatten(1).T)
    piece = ParameterSlice("p", (8, 5), (Cut(0, 2, 4),))
    assert_close(found.cut(piece).dense(), piece.take(kept), kept.abs().max())
    scaled = found.scaled(torch.tensor([1.0, 2.0, 0.5]))
    assert isinstance(scaled, LowRank)
    assert torch.equal(scaled.error, found.error)


def test_what_is_no_matrix_is_refused():
    """Vectors have no singular values, and no rank is below one."""
    with pytest.raises(ValueError, match="no approximation of rank 2"):
        LowRank.of(make_dense(2, (5,))[0], 2)
    with pytest.raises(ValueError, match="no approximation of rank 0"):
        LowRank.of(make_factored(2, 2, (3, 3))[0], 0)
    with pytest.raises(ValueError, match="one error for each"):
        LowRank(torch.zeros(2, 1, 3), torch.zeros(2, 1, 3), torch.zeros(3))
