"""The identities of interference on gradients of a real grouped-query model, in every encoding."""

import functools
import itertools

import numpy as np
import pytest
import torch

import fisherscope as fs
from fisherscope.analyses import InterferenceConfig
from fisherscope.analyses.interference import interference_matrix, matrix
from fisherscope.analyses.interference.denominator import Ridge, denominators
from fisherscope.analyses.slices import SliceReader, damping, find_block, stored_blocks
from fisherscope.instrument.objectives import CAUSAL_LM
from tests import models

# so few samples of random gradients have flat spectra
pytestmark = pytest.mark.filterwarnings("ignore:.*smallest non-zero eigenvalue")

ENCODINGS = ["dense", "factored", "lowrank"]
DIAGONAL = ["unsigned", "natural", "signed", "symmetric"]
FORMS = [*DIAGONAL, "full"]
PLACES = [(0, "Q", 3), (1, "K", 1), (0, "V", 0), (1, "O", 2)]
# of float32, relative to the largest score
TOLERANCE = 1e-5
RANK = 4
MODEL = "qwen2"  # Q, K and V have biases; two query heads use one kv head
ROWS = {"math": models.rows(9), "code": models.rows(6, seed=5)}


def collected(path, encoding, rows=ROWS, *, model=None, name=MODEL, **options):
    """Gradients of attention in float32; low rank is an approximation, the others are exact."""
    kept = fs.SampleGradients(encoding=encoding, dtype="float32", rank=RANK)
    options = {"batch_size": 3, "quiet": True, "extensions": ("fisher", kept), "durability": "none"} | options
    return fs.wrap(model or models.build(models.named(name))).collect(rows, path, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The store of a model and an encoding, collected once."""

    @functools.cache
    def make(encoding, name=MODEL):
        store = collected(tmp_path_factory.mktemp(encoding) / "run.fs", encoding, name=name)
        weights = {n for n in store.gradient_parameters if n.endswith("weight")}
        assert {store.encoding(n) for n in weights} == {encoding}
        return store

    return make


def scores(store, a, b, place, **options):
    layer, block, head = place
    found = matrix(store, a, b, layer=layer, block=block, head=head, config=InterferenceConfig(**options))
    return found.to_numpy().astype(np.float64)


def every(store, a, b, **options):
    """Scores of all head slices of the first layer, with their place."""
    for block in stored_blocks(store)[:4]:
        for head in range(len(block)):
            place = (block.attention.layer, block.name, head)
            yield place, scores(store, a, b, place, **options)


def close(found, expected, tolerance=TOLERANCE):
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    assert np.nanmax(np.abs(found - expected)) <= tolerance * np.nanmax(np.abs(expected))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_low_rank_is_an_approximation_here(made, encoding):
    """What is said of low rank below is not said of exact gradients: rank 4 leaves out some of them."""
    errors = made(encoding).encoding_errors("math")
    assert errors.empty == (encoding != "lowrank")
    if encoding == "lowrank":
        assert (errors > 1e-3).to_numpy().mean() > 0.5
        assert (errors < 1).to_numpy().all()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("form", DIAGONAL)
@pytest.mark.parametrize("name", [MODEL, "llama-biases"])
def test_heads_add_up_to_the_block(made, encoding, form, name):
    """With aggregate="sum", for all of Q, K, V and O: the whole weight, without the bias."""
    store = made(encoding, name)
    reader = SliceReader(store, 1 << 30)
    config = InterferenceConfig(form=form)
    for block in stored_blocks(store):
        where = (block.attention.layer, block.name)
        parts = sum(
            scores(store, "math", "code", (*where, head), form=form, aggregate="sum")
            for head in range(len(block))
        )
        whole = {t: store.gradients(t, block.partition.parameter).flatten(1) for t in ROWS}
        fishers = [store.fisher(t, block.partition.parameter).flatten() for t in ROWS]
        fisher = fishers[0] if config.pool == "A" else (fishers[0] + fishers[1]) / 2
        h = {task: whole[task] * reader.factors(task)[:, None] for task in ROWS}
        right = whole["code"] if config.one_sided else h["code"]
        lam = damping(fisher, Ridge.of(config))
        close(parts, interference_matrix(h["math"], right, fisher, lam, form=form, aggregate="sum").numpy())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_full_is_no_sum_of_heads(made, encoding):
    """The inverse of a whole block's F couples its heads; ``aggregate`` changes nothing."""
    by_aggregate = [
        scores(made(encoding), "math", "code", (0, "Q", 1), form="full", aggregate=a) for a in ("sum", "mean")
    ]
    np.testing.assert_array_equal(*by_aggregate)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_loss_times_a_number(made, encoding, tmp_path):
    """The unsigned form is multiplied by it, the other four stay: 1e-5."""
    larger = collected(
        tmp_path / "run.fs", encoding, objective=lambda model, batch: 37.0 * CAUSAL_LM.losses(model, batch)
    )
    for form in FORMS:
        factor = 37 if form == "unsigned" else 1
        for place in PLACES:
            before = scores(made(encoding), "math", "code", place, form=form)
            close(scores(larger, "math", "code", place, form=form), factor * before)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("form", ["signed", "symmetric", "full"])
def test_symmetric_when_pooled(made, encoding, form):
    """M_ij of A on B is M_ji of B on A, and a task with itself is symmetric."""
    for place in PLACES:
        there = scores(made(encoding), "math", "code", place, form=form)
        close(there, scores(made(encoding), "code", "math", place, form=form).T)
        own = scores(made(encoding), "math", "math", place, form=form)
        close(own, own.T)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_another_order_of_batches_changes_nothing(made, encoding, tmp_path):
    """Rows from last to first, in batches of another size: each pair's score is the same up to rounding."""
    turned = {task: rows[::-1] for task, rows in ROWS.items()}
    other = collected(tmp_path / "run.fs", encoding, turned, batch_size=4)
    for form in FORMS:
        for place in PLACES:
            before = scores(made(encoding), "math", "code", place, form=form)
            close(scores(other, "math", "code", place, form=form)[::-1, ::-1], before)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_dead_head_collapses(encoding, tmp_path):
    """V of a kv head, weight and bias, and O of its query heads are zero: their scores are 0, others' not."""
    model = models.build(models.named(MODEL))
    attention = model.model.layers[0].self_attn
    width = attention.head_dim
    with torch.no_grad():
        attention.v_proj.weight[:width] = 0
        attention.v_proj.bias[:width] = 0
        attention.o_proj.weight[:, : 2 * width] = 0
    store = collected(tmp_path / "run.fs", encoding, model=model)
    dead = {
        (0, block, head) for block, heads in (("Q", 2), ("K", 1), ("V", 1), ("O", 2)) for head in range(heads)
    }
    for form in FORMS:
        flat = {place for place, found in every(store, "math", "code", form=form) if not found.any()}
        assert flat == dead, form


@pytest.mark.parametrize(
    ("encoding", "forms"),
    [
        ("dense", FORMS),
        *((encoding, ["unsigned", "full"]) for encoding in ENCODINGS[1:]),
        *(
            pytest.param(encoding, ["natural", "signed", "symmetric"], marks=pytest.mark.slow)
            for encoding in ENCODINGS[1:]
        ),
    ],
)
def test_flat_slices_do_not_explode(encoding, forms, tmp_path):
    """A task whose samples have two tokens attends to one position only: Q and K have no gradient, F = 0.

    Whoever's F divides, scores with it are 0, and no others are.
    """
    model = models.build(models.named(MODEL))
    # other implementations of attention leave rounding where this one has zeros
    model.set_attn_implementation("eager")
    short = [{"input_ids": row["input_ids"][:2], "labels": row["input_ids"][:2]} for row in models.rows(7)]
    store = collected(tmp_path / "run.fs", encoding, {"math": ROWS["math"], "short": short}, model=model)
    pools, orders = ("A", "B", "pooled"), (("math", "short"), ("short", "math"))
    for form, pool, (first, second) in itertools.product(forms, pools, orders):
        for place, found in every(store, first, second, form=form, fisher_pool=pool):
            assert np.isfinite(found).all(), (form, pool, place)
            assert found.any() == (place[1] in {"V", "O"}), (form, pool, place)


class Both:
    """h of one slice as it was computed and as it is kept at low rank, and how far apart they may be.

    Attributes:
        exact, kept: ``[n, size]``, float64.
        error: ``[n]``, what the store records of the whole parameter: a slice of it is no farther off.
        scale: ``[n]``, what makes g of h.
    """

    def __init__(self, exact, kept, task, place):
        layer, name, head = place
        block = find_block(kept, layer, name, "weight", "decoder")
        self.scale = 1 / SliceReader(kept, 1 << 30).factors(task).double().numpy()
        self.exact, self.kept = (
            block.read(store, task, head, slice(None)).double().numpy() / self.scale[:, None]
            for store in (exact, kept)
        )
        parameter = block.partition.parameter
        norms = exact.gradients(task, parameter).flatten(1).norm(dim=1).numpy() / self.scale
        # rounding to float32 beside it
        self.error = (kept.encoding_errors(task)[parameter].to_numpy() + 1e-6) * norms
        distance = np.linalg.norm(self.exact - self.kept, axis=1)
        assert (distance <= self.error).all()
        assert (distance > 1e-3 * norms).any()


def norms(values):
    return np.linalg.norm(values, axis=-1)


def largest_difference(form, a, b, f):
    """Of M in the diagonal forms ``[n_a, n_b]``: what errors of h can do at most, by Cauchy and Schwarz."""
    if form in {"signed", "symmetric"}:
        # x'y' - xy = (x' - x) y' + x (y' - y), the same for absolute values
        return a.error[:, None] * norms(b.kept / f) + norms(a.exact / f)[:, None] * b.error
    f = f if form == "unsigned" else f**1.5
    right, error = np.abs(b.kept) * b.scale[:, None], b.error * b.scale
    # x'^2 - x^2 = (x' - x) (x' + x)
    both = np.abs(a.exact) + np.abs(a.kept)
    first = a.error[:, None] * norms(both[:, None] * right / f)
    return first + norms(a.exact**2 / f)[:, None] * error


@pytest.mark.parametrize("form", DIAGONAL)
@pytest.mark.parametrize("place", PLACES)
def test_low_rank_is_as_far_from_dense_as_its_errors_allow(made, form, place):
    """Scores of the same gradients differ by no more than the recorded errors can make them, pair by pair."""
    exact, kept = made("dense"), made("lowrank")
    a, b = (Both(exact, kept, task, place) for task in ROWS)
    layer, name, head = place
    reader, config = SliceReader(exact, 1 << 30), InterferenceConfig(form=form)
    fisher, lam = denominators(
        reader, find_block(exact, layer, name, "weight", "decoder"), [("math", "code")], config
    )["math", "code"]
    bound = largest_difference(form, a, b, fisher[head].double().numpy() + lam) / fisher.shape[1]
    before, found = (scores(store, "math", "code", place, form=form) for store in (exact, kept))
    scale = np.abs(before).max()
    assert (np.abs(found - before) <= bound + TOLERANCE * scale).all()
    assert np.abs(found - before).max() > TOLERANCE * scale


@pytest.mark.parametrize("place", PLACES)
def test_low_rank_is_as_far_from_dense_in_the_full_form(made, place):
    """The same where the gradients make F as well, with a damping that does not depend on them.

    F'^-1 - F^-1 = F'^-1 (F - F') F^-1, and F - F' is a sum of terms that the errors bound.
    """
    exact, kept = made("dense"), made("lowrank")
    a, b = (Both(exact, kept, task, place) for task in ROWS)
    size = a.exact.shape[1]

    def fisher(values):
        return sum(v.T @ v / len(v) for v in values) / 2

    plain, approximate = fisher([a.exact, b.exact]), fisher([a.kept, b.kept])
    lam = float(np.linalg.eigvalsh(plain)[-1])
    inverse, other = (np.linalg.inv(f + lam * np.eye(size)) for f in (plain, approximate))
    apart = sum((s.error * (norms(s.exact) + norms(s.kept))).mean() for s in (a, b)) / 2
    assert np.linalg.norm(plain - approximate, 2) <= apart
    left, right = norms(a.exact @ inverse), norms(b.kept @ other)
    bound = a.error[:, None] * right + left[:, None] * b.error + left[:, None] * apart * right
    options = {"form": "full", "ridge": lam, "ridge_rel": 0.0}
    before, found = (scores(store, "math", "code", place, **options) for store in (exact, kept))
    close(before, a.exact @ inverse @ b.exact.T)
    scale = np.abs(before).max()
    assert (np.abs(found - before) <= bound + TOLERANCE * scale).all()
    assert np.abs(found - before).max() > TOLERANCE * scale
