"""Each operation of each representation equals that operation on the gradients themselves."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fisherscope.layout import Cut, ParameterSlice, Partition
from fisherscope.linalg import Dense, Factored, Total, cost, gradient
from tests.linalg.linalg_cases import (
    any_case,
    assert_close,
    factored_cases,
    make_dense,
    make_factored,
    make_rows,
    per_piece,
)

# The autouse and monkeypatch fixtures hold for all examples of a test, which is what is wanted here.
same_patch = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(any_case())
def test_dense(case):
    """``dense`` is the sum of outer products, float32."""
    assert_close(case.gradient.dense(), case.reference)
    assert case.gradient.n == case.reference.shape[0]
    assert case.gradient.shape == tuple(case.reference.shape[1:])


@given(any_case(), st.integers(0, 99))
def test_scaled(case, seed):
    """Each sample has its own factor; the original stays as it was."""
    n, dims = case.gradient.n, len(case.gradient.shape)
    factors = torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.1
    scaled = case.gradient.scaled(factors)
    assert type(scaled) is type(case.gradient)
    assert_close(scaled.dense(), case.reference * factors.double().view(n, *(1,) * dims))
    assert_close(case.gradient.dense(), case.reference)


@given(any_case())
def test_cut(case):
    """Cutting the representation is cutting the gradients: every head of every partition."""
    for partition in case.partitions:
        for piece in partition or ():
            cut = case.gradient.cut(piece)
            assert cut.shape == piece.slice_shape
            assert_close(cut.dense(), piece.take(case.reference), case.reference.abs().max())


def test_cut_along_both_axes_with_steps():
    """A slice may cut rows and columns at once, and skip some."""
    piece = ParameterSlice("p", (6, 5), (Cut(1, 1, 5, 2), Cut(0, 2, 6, 3)))
    for made in (make_factored(2, 3, (6, 5)), make_dense(2, (6, 5))):
        assert_close(made[0].cut(piece).dense(), piece.take(made[1]))


@pytest.mark.parametrize("make", [lambda: make_factored(2, 3, (6, 5))[0], lambda: make_dense(2, (6, 5))[0]])
def test_cut_refuses_a_slice_of_another_parameter(make):
    """A slice of a parameter of another shape is an error, not a wrong cut."""
    with pytest.raises(ValueError, match="cannot cut 'other'"):
        make().cut(ParameterSlice("other", (5, 6), (Cut(0, 0, 2),)))


@given(any_case())
def test_norms(case):
    """Squares summed per piece, whichever route the cost model takes."""
    expected = per_piece(case.reference**2, case.partitions)
    for actual, wanted in zip(case.gradient.norms(case.partitions), expected, strict=True):
        assert_close(actual, wanted, (case.reference**2).flatten(1).sum(1).max())


@pytest.mark.parametrize("gram", [True, False], ids=["gram", "materialised"])
@same_patch
@given(factored_cases())
def test_both_routes_to_norms(monkeypatch, gram, case):
    """The Gram matrix over positions and the materialised gradient give the same norms."""
    monkeypatch.setattr(cost, "gram_is_cheaper", lambda *_: gram)
    expected = per_piece(case.reference**2, case.partitions)
    for actual, wanted in zip(case.gradient.norms(case.partitions), expected, strict=True):
        assert_close(actual, wanted, (case.reference**2).flatten(1).sum(1).max())
        assert (actual >= 0).all()


def test_the_cost_model_chooses():
    """Few positions and a wide matrix take the Gram route, many positions and a narrow one do not."""
    assert cost.gram_is_cheaper(16, (1536, 1536), 0)
    assert not cost.gram_is_cheaper(512, (64, 64), 0)
    assert cost.pair_gram_is_cheaper(4, 4, 2, 2, (1024, 1024))
    assert not cost.pair_gram_is_cheaper(64, 64, 64, 64, (32, 32))


@given(any_case(), st.integers(0, 99))
def test_dots(case, seed):
    """Inner products with the parameter, per piece."""
    theta = torch.randn(case.gradient.shape, generator=torch.Generator().manual_seed(seed))
    product = case.reference * theta.double()
    expected = per_piece(product, case.partitions)
    scale = product.abs().flatten(1).sum(1).max() * 4
    for actual, wanted in zip(case.gradient.dots(theta, case.partitions), expected, strict=True):
        assert_close(actual, wanted, scale)


@given(any_case())
def test_gram_with_itself(case):
    """All inner products of the samples."""
    flat = case.reference.flatten(1)
    assert_close(case.gradient.gram(), flat @ flat.T)


def _others(shape):
    """Another set of samples, in each representation that the shape allows."""
    yield make_dense(3, shape, seed=7)
    if len(shape) == 2:
        factored = make_factored(3, 5, shape, seed=8)
        rows = make_rows(3, 5, shape, seed=9)
        yield from (factored, rows, (Total(factored[0], rows[0]), factored[1] + rows[1]))


@given(any_case())
def test_gram_with_others(case):
    """Inner products with other samples, in whichever representation they come."""
    mine = case.reference.flatten(1)
    for other, reference in _others(case.gradient.shape):
        theirs = reference.flatten(1)
        scale = mine.norm(dim=1).max() * theirs.norm(dim=1).max()
        assert_close(case.gradient.gram(other), mine @ theirs.T, scale)


@pytest.mark.parametrize("pairs", [True, False], ids=["positions", "materialised"])
@same_patch
@given(factored_cases())
def test_both_routes_to_gram(monkeypatch, pairs, case):
    """Over positions or materialised, the inner products are the same."""
    monkeypatch.setattr(cost, "pair_gram_is_cheaper", lambda *_: pairs)
    flat = case.reference.flatten(1)
    assert_close(case.gradient.gram(), flat @ flat.T)


@pytest.mark.parametrize("budget", [4, 16, 200, 1 << 20])
@same_patch
@given(case=any_case())
def test_tiles_cover_everything_once(monkeypatch, budget, case):
    """Every entry of every sample is in exactly one tile, whatever the memory allowed."""
    monkeypatch.setitem(gradient._TILE_BYTES, "cpu", budget)
    seen = torch.zeros(case.reference.shape)
    rebuilt = torch.zeros(case.reference.shape)
    for samples, rows, tile in case.gradient.tiles():
        assert tile.shape == rebuilt[samples, rows].shape
        seen[samples, rows] += 1
        rebuilt[samples, rows] = tile
    assert torch.equal(seen, torch.ones_like(seen))
    assert_close(rebuilt, case.reference)


def test_tiles_respect_the_budget_in_wide_layers(monkeypatch):
    """A layer wider than a tile is cut along its rows: never more than the budget, never a whole layer."""
    monkeypatch.setitem(gradient._TILE_BYTES, "cpu", 4096)
    factored, reference = make_factored(3, 2, (50, 300))
    tiles = [(samples, rows, tile.clone()) for samples, rows, tile in factored.tiles()]
    assert max(tile.nbytes for _, _, tile in tiles) <= 4096
    assert len(tiles) == 3 * math.ceil(50 / (4096 // 4 // 300))
    dense = Dense(reference.float())
    assert max(tile.nbytes for _, _, tile in dense.tiles()) <= 4096


@pytest.mark.parametrize("budget", [4, 64, 1 << 20])
@same_patch
@given(case=any_case())
def test_accumulate_does_three_things_in_one_pass(monkeypatch, budget, case):
    """Sum of squares, sum, and norms together equal each on its own; sums are added to what is there."""
    monkeypatch.setitem(gradient._TILE_BYTES, "cpu", budget)
    square, total = torch.full(case.gradient.shape, 2.0), torch.full(case.gradient.shape, -3.0)
    norms = case.gradient.accumulate(square=square, total=total, partitions=case.partitions)
    assert_close(square, (case.reference**2).sum(0) + 2)
    assert_close(total, case.reference.sum(0) - 3, case.reference.abs().sum(0).max() + 3)
    expected = per_piece(case.reference**2, case.partitions)
    for actual, wanted in zip(norms, expected, strict=True):
        assert_close(actual, wanted, (case.reference**2).flatten(1).sum(1).max())


@pytest.mark.parametrize("n", [2, 9], ids=["few", "many"])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("wanted", ["square", "total", "both", "neither"])
def test_accumulate_of_what_is_asked(n, axis, wanted):
    """Each choice of squares, sum and norms takes a way of its own through the tiles; all are exact."""
    factored, reference = make_factored(n, 3, (6, 8), seed=n)
    asked = ("square", "total") if wanted == "both" else (wanted,)
    sinks = {name: torch.ones(6, 8) for name in ("square", "total") if name in asked}
    partitions = [] if axis is None else [Partition("p", (6, 8), axis, (4, 0), 2), None]
    norms = factored.accumulate(**sinks, partitions=partitions)
    expected = {"square": (reference**2).sum(0) + 1, "total": reference.sum(0) + 1}
    for name, sink in sinks.items():
        assert_close(sink, expected[name], expected[name].abs().max() + n)
    for actual, value in zip(norms, per_piece(reference**2, partitions), strict=True):
        assert_close(actual, value, (reference**2).flatten(1).sum(1).max())


@pytest.mark.parametrize("budget", [4, 100, 1 << 20])
@pytest.mark.parametrize("images", [True, False], ids=["images", "products"])
def test_few_samples_at_a_time(monkeypatch, budget, images):
    """Norms by Gram matrices and inner products are the same in blocks of samples as all at once."""
    monkeypatch.setitem(gradient._TILE_BYTES, "cpu", budget)
    monkeypatch.setattr(cost, "gram_is_cheaper", lambda *_: True)
    factored, reference = make_factored(5, 3, (6, 8))
    theta = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    if images:
        left, right = factored.left, factored.right
        factored = Factored(left, right, left_image=left @ theta, right_image=right @ theta.T)
    partitions = [Partition("p", (6, 8), 0, (3, 0), 3), Partition("p", (6, 8), 1, (0, 4), 4), None]
    product = reference * theta.double()
    for values, found, scale in (
        (reference**2, factored.norms(partitions), (reference**2).flatten(1).sum(1).max()),
        (product, factored.dots(theta, partitions), product.abs().flatten(1).sum(1).max() * 4),
    ):
        for actual, expected in zip(found, per_piece(values, partitions), strict=True):
            assert_close(actual, expected, scale)


@given(any_case())
def test_square_sum_is_square_then_sum(case):
    """E[g^2] and not (E g)^2: every sample is squared before anything is added."""
    assert_close(case.gradient.square_sum(), (case.reference**2).sum(0))


def test_accumulate_of_parts_is_accumulate_of_the_whole():
    """Streaming two batches into one accumulator gives what one batch gives."""
    factored, reference = make_factored(5, 3, (6, 7))
    square = torch.zeros(6, 7)
    for part in (slice(0, 2), slice(2, 5)):
        Factored(factored.left[part], factored.right[part]).accumulate(square=square)
    assert_close(square, (reference**2).sum(0))
    assert factored.accumulate() == []


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_two_lookups_of_one_table_are_joined(n, positions, seed):
    """Two uses of an embedding: equal rows of a sample are added, and stay unique."""
    first, reference = make_rows(n, positions, (5, 3), seed)
    second, other = make_rows(n, 4, (5, 3), seed + 1)
    both = first.joined(second)
    assert_close(both.dense(), reference + other, reference.abs().max() + other.abs().max() + 1)
    assert len(torch.unique(both.sample * 5 + both.row)) == len(both.row)


def test_rows_stay_few_in_a_large_table():
    """A table of a million rows: squares, norms and inner products never form it per sample."""
    ids = torch.tensor([[7, 999_999, 7], [3, 7, 3]])
    rows = make_rows(1, 1, (2, 2))[0].of_tokens(ids, torch.ones(2, 3, 4), 1_000_000)
    assert rows.norms([None])[0].flatten().tolist() == [4 * 4 + 4, 4 * 4 + 4]
    assert rows.gram().tolist() == [[20.0, 8.0], [8.0, 20.0]]
    assert rows.dots(torch.ones(1_000_000, 4), [None])[0].flatten().tolist() == [12.0, 12.0]


def test_gradients_of_different_size_are_no_total():
    """Parts belong to the same samples and the same parameter."""
    with pytest.raises(ValueError, match="different size"):
        Total(make_dense(2, (3, 4))[0], make_dense(2, (4, 3))[0])


@given(factored_cases(), st.integers(1, 4))
def test_concatenated_is_the_sum(case, positions):
    """Two uses of one parameter: their gradients are added before anything is squared."""
    other, reference = make_factored(case.gradient.n, positions, case.gradient.shape, seed=3)
    both = case.gradient.concatenated(other)
    scale = case.reference.abs().max() + reference.abs().max()
    assert_close(both.dense(), case.reference + reference, scale)
    assert both.positions == case.gradient.positions + positions


def test_padding_adds_nothing():
    """Positions whose output gradient is zero change neither gradients nor norms, by either route."""
    factored, reference = make_factored(3, 4, (5, 6))
    padded = Factored(
        torch.cat([factored.left, torch.zeros(3, 2, 5)], 1),
        torch.cat([factored.right, torch.randn(3, 2, 6)], 1),
    )
    assert_close(padded.dense(), reference)
    assert_close(padded._marginal_squares(0), (reference**2).sum(2))
    assert_close(padded._marginal_squares(1), (reference**2).sum(1))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-6)]
)
@pytest.mark.parametrize("gram", [True, False], ids=["gram", "materialised"])
def test_factors_of_other_precision(monkeypatch, dtype, tolerance, gram):
    """Another compute dtype works through every operation and always gives float32."""
    monkeypatch.setattr(cost, "gram_is_cheaper", lambda *_: gram)
    monkeypatch.setattr(cost, "pair_gram_is_cheaper", lambda *_: gram)
    factored, _ = make_factored(3, 4, (5, 6))
    factored = Factored(factored.left.to(dtype), factored.right.to(dtype)).scaled(torch.ones(3))
    reference = torch.bmm(factored.left.double().mT, factored.right.double())
    theta = torch.randn(5, 6)
    results = [
        (factored.dense(), reference),
        (factored.square_sum(), (reference**2).sum(0)),
        (factored.norms([None])[0], (reference**2).sum((1, 2)).unsqueeze(1)),
        (factored.dots(theta, [None])[0], (reference * theta).sum((1, 2)).unsqueeze(1)),
        (factored.gram(), reference.flatten(1) @ reference.flatten(1).T),
    ]
    for actual, expected in results:
        assert actual.dtype == torch.float32
        assert (actual - expected).norm() <= tolerance * expected.norm()


def test_no_samples_and_no_positions():
    """An empty batch and a sample without positions are zeros, not errors."""
    empty = Factored(torch.zeros(0, 3, 5), torch.zeros(0, 3, 6))
    assert torch.equal(empty.square_sum(), torch.zeros(5, 6))
    assert empty.norms([None])[0].shape == (0, 1)
    assert torch.equal(Factored(torch.zeros(2, 0, 5), torch.zeros(2, 0, 6)).square_sum(), torch.zeros(5, 6))
    assert torch.equal(Dense(torch.zeros(0, 4)).square_sum(), torch.zeros(4))


@pytest.mark.parametrize(
    ("left", "right"), [((2, 3), (2, 3, 4)), ((2, 3, 4), (2, 2, 4)), ((2, 3, 4), (1, 3, 4))]
)
def test_factors_must_fit(left, right):
    """Factors have one row per sample and position; the message shows both shapes."""
    with pytest.raises(ValueError, match="expected factors"):
        Factored(torch.zeros(left), torch.zeros(right))
    with pytest.raises(ValueError, match="at least one parameter axis"):
        Dense(torch.zeros(3))
