"""The five forms of interference against slow loops over pairs, and the identities that each obeys."""

import functools
import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

import fisherscope as fs
from fisherscope.analyses import AnalyzeConfig, ConflictConfig, InterferenceConfig, run
from fisherscope.analyses.interference import interference_matrix, matrix
from fisherscope.analyses.interference.full import FullScorer
from fisherscope.analyses.slices import Loaded, SliceReader, find_block
from tests import models
from tests.analyses.synthetic import make_layout, make_task, write_store

# so few samples of random gradients have flat spectra
pytestmark = pytest.mark.filterwarnings("ignore:.*smallest non-zero eigenvalue")

FORMS = ["unsigned", "natural", "signed", "symmetric", "full"]
SYMMETRIC = ["signed", "symmetric", "full"]
PLACES = [(0, "Q", 3), (1, "K", 1), (0, "V", 0), (1, "O", 2)]
POOLS = {"unsigned": "A", "natural": "A", "signed": "pooled", "symmetric": "pooled", "full": "pooled"}
# float32 products of float32 gradients; relative to the largest score
TOLERANCE = 1e-5


def interference(store, memory_budget=1 << 30, tasks=None, **options):
    config = AnalyzeConfig(
        interference=InterferenceConfig(**options),
        conflict=ConflictConfig(calibration_splits=0),
        memory_budget=memory_budget,
        tasks=tasks,
    )
    return run(store, ["interference"], config)["interference"]


def scores(store, a, b, layer, block, head, leave_pair_out=False, **options):
    config = InterferenceConfig(**options)
    found = matrix(
        store, a, b, layer=layer, block=block, head=head, config=config, leave_pair_out=leave_pair_out
    )
    return found.to_numpy().astype(np.float64)


def close(found, expected, tolerance=TOLERANCE):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    scale = np.nanmax(np.abs(expected))
    assert np.nanmax(np.abs(found - expected)) <= tolerance * scale


def slices_of(store, task, layer, block, part="weight"):
    """g and h of all heads of a block ``[heads, n, size]``, float64."""
    g = store.slices(task, layer=layer, block=block, part=part).double()
    tokens = torch.tensor(store.samples(task)["tokens"].tolist(), dtype=torch.float64)
    return g.numpy(), (g / tokens.sqrt()[:, None]).numpy()


def slow(store, a, b, layer, block, head, form, *, pool=None, aggregate="mean", left_out=False):
    """A form as it is written down: a loop over pairs of samples, in float64."""
    (_, h_a), (g_b, h_b) = slices_of(store, a, layer, block), slices_of(store, b, layer, block)
    pool = pool or POOLS[form]
    out = np.full((h_a.shape[1], h_b.shape[1]), np.nan)
    if form == "full":
        return slow_full(h_a[head], h_b[head], a == b, pool, out, left_out=left_out)
    f_a, f_b = (h_a**2).mean(1), (h_b**2).mean(1)
    whole = {"A": f_a, "B": f_b, "pooled": (f_a + f_b) / 2}[pool]
    f = whole[head] + 1e-6 * np.median(whole)
    for i, h_i in enumerate(h_a[head]):
        for j, h_j in enumerate(h_b[head]):
            if a == b and i == j:
                continue
            g_j = g_b[head, j]
            terms = {
                "unsigned": h_i**2 / f * abs(g_j),
                "natural": h_i**2 / f * abs(g_j) / np.sqrt(f),
                "signed": h_i * h_j / f,
                "symmetric": np.sqrt(h_i**2 * h_j**2) / f,
            }[form]
            out[i, j] = terms.mean() if aggregate == "mean" else terms.sum()
    return out


def slow_full(h_a, h_b, same, pool, out, *, left_out):
    """A dense inverse; one per pair where the pair is left out of F."""

    def outer(h):
        return h.T @ h / len(h) if len(h) else np.zeros((h.shape[1],) * 2)

    def fisher(kept_a, kept_b):
        if same:
            kept_b = kept_a
        return {"A": outer(kept_a), "B": outer(kept_b), "pooled": (outer(kept_a) + outer(kept_b)) / 2}[pool]

    whole = fisher(h_a, h_b)
    values = np.linalg.eigvalsh(whole)
    lam = 0.1 * values[values > 1e-10 * values.max()].mean() * np.eye(h_a.shape[1])
    for i, h_i in enumerate(h_a):
        for j, h_j in enumerate(h_b):
            if same and i == j:
                continue
            used = whole
            if left_out:
                gone = [i, j] if same else [i]
                used = fisher(np.delete(h_a, gone, 0), np.delete(h_b, j, 0))
            out[i, j] = h_i @ np.linalg.inv(used + lam) @ h_j
    return out


@pytest.fixture(scope="module")
def factored(tmp_path_factory):
    """Two tasks of unequal size, collected from a real grouped-query model, as factors in float32."""
    tasks = {"math": models.rows(7), "code": models.rows(5, seed=5)}
    scope = fs.wrap(models.build(models.named("llama-biases")))
    kept = fs.SampleGradients(encoding="factored", dtype="float32")
    path = tmp_path_factory.mktemp("factored") / "run.fs"
    return scope.collect(tasks, path, extensions=("fisher", kept), batch_size=3, quiet=True)


@pytest.fixture(scope="module")
def analysed(made):
    """What each form gives with its defaults, analysed once."""

    @functools.cache
    def analyse(form):
        return interference(made.store, form=form)

    return analyse


@pytest.fixture(params=["dense", "factored"])
def store(request, made):
    found = made.store if request.param == "dense" else request.getfixturevalue("factored")
    weights = [name for name in found.gradient_parameters if name.endswith("weight")]
    assert {found.encoding(name) for name in weights} == {request.param}
    return found


@pytest.mark.parametrize("form", FORMS)
def test_forms_equal_a_loop_over_pairs(store, form):
    """Each form, dense and factored, both orders of tasks of unequal size: 1e-5."""
    for layer, block, head in PLACES:
        for a, b in (("math", "code"), ("code", "math")):
            found = scores(store, a, b, layer, block, head, form=form)
            close(found, slow(store, a, b, layer, block, head, form))


@pytest.mark.parametrize("pool", ["A", "B", "pooled"])
@pytest.mark.parametrize(("a", "b"), [("math", "code"), ("code", "math"), ("math", "math")])
def test_full_equals_a_dense_inverse_in_float64(made, pool, a, b):
    """In-sample and with each pair left out, across tasks of unequal size, and one task with itself: 1e-8.

    Of a dense store: products of factors are rounded to float32, one way for a head and another for all.
    """
    reader = SliceReader(made.store, 1 << 30)
    config = InterferenceConfig(form="full", fisher_pool=pool)
    for layer, name, head in PLACES:
        block = find_block(made.store, layer, name, "weight", "decoder")
        scorer = FullScorer(reader, tuple(dict.fromkeys((a, b))), config)
        solved = scorer.solve(Loaded(reader, block, head, scorer.all_rows), a, b)
        for found, left_out in ((solved.scores, False), (solved.left_out, True)):
            expected = slow(made.store, a, b, layer, name, head, "full", pool=pool, left_out=left_out)
            close(np.where(np.isnan(expected), np.nan, found), expected, 1e-8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pool", ["A", "B", "pooled"])
def test_forms_take_any_pool(made, form, pool):
    """Either task's F, or both, in every form; also a task with itself, without its diagonal."""
    for b in ("code", "math"):
        found = scores(made.store, "math", b, 0, "V", 1, form=form, fisher_pool=pool)
        close(found, slow(made.store, "math", b, 0, "V", 1, form, pool=pool))


@pytest.mark.parametrize("form", FORMS[:4])
def test_forms_take_sums(made, form):
    """The sum over the entries in place of the mean; the full form is neither."""
    found = scores(made.store, "math", "code", 1, "O", 0, form=form, aggregate="sum")
    close(found, slow(made.store, "math", "code", 1, "O", 0, form, aggregate="sum"))
    same = [scores(made.store, "math", "code", 1, "O", 0, form="full", aggregate=a) for a in ("mean", "sum")]
    np.testing.assert_array_equal(*same)


@pytest.mark.parametrize("pool", ["A", "B", "pooled"])
@pytest.mark.parametrize(("a", "b"), [("math", "code"), ("code", "math"), ("math", "math")])
def test_full_leaves_reported_pairs_out(made, pool, a, b):
    """Pairs that are reported are scored with F of the other samples, as by one dense inverse per pair."""
    options = {"form": "full", "fisher_pool": pool}
    found = scores(made.store, a, b, 1, "Q", 2, leave_pair_out=True, **options)
    expected = slow(made.store, a, b, 1, "Q", 2, "full", pool=pool, left_out=True)
    close(found, expected)
    in_sample = scores(made.store, a, b, 1, "Q", 2, **options)
    assert np.nanmax(np.abs(found - in_sample)) > 0.01 * np.nanmax(np.abs(found))
    result = interference(made.store, tasks=tuple(dict.fromkeys((a, b))), include_self=a == b, **options)
    pairs = result.top(100_000, task_a=a, task_b=b)
    here = pairs[(pairs["layer"] == 1) & (pairs["block"] == "Q") & (pairs["head"] == 2)]
    for row in here.to_dict("records"):
        i, j = (int(row[side].rpartition("_")[2]) for side in ("sample_i", "sample_j"))
        assert abs(row["score"] - expected[i, j]) <= TOLERANCE * np.nanmax(np.abs(expected))


@pytest.mark.parametrize("form", FORMS[:4])
@pytest.mark.parametrize("block", ["Q", "K", "V", "O"])
def test_head_slices_add_up_to_the_block(store, form, block):
    """With aggregate="sum" the heads' scores add up to those of the whole block; O without its bias."""
    g_a, h_a = slices_of(store, "math", 0, block)
    g_b, h_b = slices_of(store, "code", 0, block)
    parts = sum(
        scores(store, "math", "code", 0, block, head, form=form, aggregate="sum") for head in range(len(g_a))
    )

    def whole(values):
        return torch.from_numpy(np.concatenate(list(values), 1))

    f_a, f_b = (whole(h**2).mean(0) for h in (h_a, h_b))
    fisher = f_a if POOLS[form] == "A" else (f_a + f_b) / 2
    right = g_b if form in {"unsigned", "natural"} else h_b
    lam = 1e-6 * float(np.median(fisher))
    close(parts, interference_matrix(whole(h_a), whole(right), fisher, lam, form=form, aggregate="sum"))
    # in the whole block are the same entries as in the parameter, and no bias
    parameter = store.layout.slice(0, block, 0).parameter
    assert whole(g_a).shape[1] == store.gradients("math", parameter)[0].numel()


@pytest.mark.parametrize("form", FORMS)
def test_scale_of_the_loss(made, layout, tmp_path, form):
    """Loss times a multiplies unsigned by a, and leaves the other forms as they are."""
    tasks = {name: task.scaled(37.0) for name, task in made.tasks.items()}
    other = write_store(tmp_path / "run.fs", layout, tasks).store
    for place in PLACES:
        before = scores(made.store, "math", "code", *place, form=form)
        close(scores(other, "math", "code", *place, form=form), before * (37 if form == "unsigned" else 1))


@pytest.mark.parametrize("form", SYMMETRIC)
def test_symmetric_when_pooled(store, form):
    """M_ij of A on B is M_ji of B on A, and a task with itself is symmetric; not so with the F of A alone."""
    for place in PLACES:
        there = scores(store, "math", "code", *place, form=form)
        close(there, scores(store, "code", "math", *place, form=form).T)
        own = scores(store, "math", "math", *place, form=form)
        close(own, own.T)
    one = scores(store, "math", "code", *PLACES[0], form=form, fisher_pool="A")
    back = scores(store, "code", "math", *PLACES[0], form=form, fisher_pool="A").T
    assert np.abs(one - back).max() > 0.01 * np.abs(one).max()


@pytest.mark.parametrize("form", FORMS)
def test_order_of_samples_only_permutes(made, layout, tmp_path, form):
    """Shuffled samples give shuffled scores."""
    order = [5, 2, 0, 11, 3, 1, 4, 6, 10, 9, 8, 7]
    tasks = {"math": made.tasks["math"].permuted(order), "code": made.tasks["code"]}
    shuffled = write_store(tmp_path / "run.fs", layout, tasks).store
    before = scores(made.store, "math", "code", 1, "V", 0, form=form)
    close(scores(shuffled, "math", "code", 1, "V", 0, form=form), before[order])


def test_batches_change_nothing(factored, tmp_path):
    """Another batch size, hence other batches and padding, gives the same scores in every form."""
    scope = fs.wrap(models.build(models.named("llama-biases")))
    tasks = {"math": models.rows(7), "code": models.rows(5, seed=5)}
    kept = fs.SampleGradients(encoding="dense", dtype="float32")
    other = scope.collect(tasks, tmp_path / "run.fs", extensions=("fisher", kept), batch_size=5, quiet=True)
    for form in FORMS:
        before = scores(factored, "math", "code", 1, "O", 1, form=form)
        close(scores(other, "math", "code", 1, "O", 1, form=form), before, 1e-4)


@pytest.fixture(scope="module")
def with_a_dead_head(tmp_path_factory):
    """V of a kv head (and its bias) and O of all its query heads are zero."""
    model = models.build(models.named("llama-biases"))
    attention = model.model.layers[0].self_attn
    width = attention.head_dim
    with torch.no_grad():
        attention.v_proj.weight[:width] = 0
        attention.v_proj.bias[:width] = 0
        attention.o_proj.weight[:, : 2 * width] = 0
    kept = fs.SampleGradients(dtype="float32")
    tasks = {"math": models.rows(4), "code": models.rows(3, seed=5)}
    out = tmp_path_factory.mktemp("dead") / "run.fs"
    return fs.wrap(model).collect(tasks, out, extensions=("fisher", kept), quiet=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_dead_head_collapses(with_a_dead_head, form):
    """Nothing moves where V and O are zero: score 0.

    Neither the heads' queries and keys nor their values reach the loss, and no gradient comes back to O.
    """
    frame = interference(with_a_dead_head, form=form).frame
    first = frame[frame["layer"] == 0]
    shared = first["block"].isin(["K", "V"])
    dead = first[(shared & (first["head"] == 0)) | (~shared & (first["head"] < 2))]
    assert len(dead) == 2 * 6
    np.testing.assert_array_equal(dead[["mean", "min", "max"]], 0)
    assert dead["flat"].all()
    alive = frame.drop(dead.index)
    assert (alive["max"] > 0).all()
    assert not alive["flat"].any()


@pytest.fixture(scope="module")
def with_a_flat_slice(tmp_path_factory):
    """One layer, in which one task has no gradient in one slice."""
    layout = make_layout(layers=1)
    tasks = {"math": make_task(layout, "math", 12, 1), "code": make_task(layout, "code", 9, 2)}
    piece = layout.slice(0, "V", 0)
    piece.take(tasks["math"].gradients[piece.parameter])[:] = 0
    return write_store(tmp_path_factory.mktemp("flat") / "run.fs", layout, tasks).store


@pytest.mark.parametrize("form", FORMS)
def test_flat_slices_give_zero_and_a_flag(with_a_flat_slice, form):
    """Where F is 0 throughout scores are 0, in any pool, and the slice is flagged."""
    found = with_a_flat_slice
    for pool, expected in (("A", [("math", "code")]), ("B", [("code", "math")]), ("pooled", [])):
        result = interference(found, form=form, fisher_pool=pool)
        assert np.isfinite(result.frame[["mean", "min", "max"]]).to_numpy().all()
        flat = result.frame[result.frame["flat"]]
        assert list(zip(flat["task_a"], flat["task_b"], strict=True)) == expected
        assert flat[["mean", "max"]].eq(0).to_numpy().all()


@pytest.mark.parametrize("form", FORMS)
def test_streaming_changes_nothing(made, analysed, form, monkeypatch):
    """Slices and scores beyond the memory budget come in stretches, with the same numbers."""
    assert_streaming_changes_nothing(made.store, analysed(form), form, monkeypatch)


@pytest.mark.parametrize(
    "form", [pytest.param(f, marks=() if f == "full" else pytest.mark.slow) for f in FORMS]
)
def test_streaming_of_factors_changes_nothing(factored, form, monkeypatch):
    """The same of gradients that are stored as factors."""
    assert_streaming_changes_nothing(factored, interference(factored, form=form), form, monkeypatch)


def assert_streaming_changes_nothing(store, before, form, monkeypatch):
    monkeypatch.setattr("fisherscope.analyses.slices._COPIES", 1 << 7)
    monkeypatch.setattr("fisherscope.analyses.interference.pairs._COPIES", 1 << 10)
    small = interference(store, memory_budget=1 << 16, form=form)
    numbers = ["mean", "min", "max", "sample_q95", "magnitude", "overlap", "effect"]
    for name in numbers:
        if before.frame[name].notna().any():
            close(small.frame[name], before.frame[name])
    close(small.top(50)["score"], before.top(50)["score"])


@pytest.mark.parametrize("form", ["signed", "full"])
def test_conflicts_and_synergies_are_both_kept(made, form):
    """Where scores have a sign, those of largest absolute value are listed, with their sign."""
    result = interference(made.store, form=form, top_pairs=40)
    reported = form == "full"
    everything = np.concatenate(
        [
            scores(made.store, "math", "code", layer, block.name, head, reported, form=form).ravel()
            for attention, block in made.layout.head_blocks()
            for layer in [attention.layer]
            for head in range(block.heads)
        ]
    )
    strongest = everything[np.argsort(-np.abs(everything))][:40]
    top = result.top(40, task_a="math", task_b="code")
    np.testing.assert_allclose(top["score"], strongest, rtol=1e-4)
    assert (top["score"] < 0).any()
    assert (top["score"] > 0).any()
    assert (result.frame["min"] < 0).all()
    assert "below 0 are conflict" in result.summary()


def test_opposed_samples_are_conflict(layout, tmp_path):
    """A task with the negated gradients of another scores below 0 on its twins; unsigned cannot tell."""
    task = make_task(layout, "a", 8, 5)
    tasks = {"a": task, "b": task.scaled(-1.0), "c": task.scaled(1.0)}
    found = write_store(tmp_path / "run.fs", layout, tasks).store
    for form in FORMS:
        against, along = (np.diag(scores(found, "a", b, 0, "Q", 0, form=form)) for b in ("b", "c"))
        if form in {"signed", "full"}:
            assert (against < 0).all()
            np.testing.assert_allclose(against, -along, rtol=1e-5)
        else:
            np.testing.assert_allclose(against, along, rtol=1e-5)


def test_normalisation_of_gradients_is_for_two_forms(made):
    """It scales |g_j| of unsigned and natural, and is an error elsewhere that says why."""
    for form in ("unsigned", "natural"):
        plain = scores(made.store, "math", "code", 0, "K", 0, form=form)
        scaled = scores(made.store, "math", "code", 0, "K", 0, form=form, normalize_gj="per_token_sum")
        close(scaled, plain / made.tasks["code"].tokens)
    for form in ("signed", "symmetric", "full"):
        with pytest.raises(ValueError, match=r"normalize_gj='per_token_sum'.*unsigned and natural"):
            InterferenceConfig(form=form, normalize_gj="per_token_sum")


def test_json_tells_what_was_applied(analysed):
    """Form, pool, aggregate, normalisation, damping and the GQA map, as applied and not as None."""
    for form in FORMS:
        result = analysed(form)
        told = json.loads(json.dumps(result.to_json(), allow_nan=False))
        config = told["config"]
        assert (config["form"], config["fisher_pool"]) == (form, POOLS[form])
        assert config["aggregate"] == ("none" if form == "full" else "mean")
        assert config["normalize_gj"] == "none"
        assert config["ridge_rel"] == (0.1 if form == "full" else 1e-6)
        assert told["details"]["gqa"][0]["kv_head"] == [0, 0, 1, 1]
        columns = told["tables"]["interference"]["columns"]
        assert {"fisher_min", "fisher_median", "fisher_max", "below_epsilon", "ridge"} <= set(columns)


def test_damping_of_the_full_form(made, analysed):
    """A tenth of the mean non-zero eigenvalue of the slice's F, or what is asked for; too little is said."""
    _, h_a = slices_of(made.store, "math", 0, "Q")
    _, h_b = slices_of(made.store, "code", 0, "Q")
    fisher = (h_a[1].T @ h_a[1] / 12 + h_b[1].T @ h_b[1] / 9) / 2
    values = np.linalg.eigvalsh(fisher)
    values = values[values > 1e-10 * values.max()]
    options = {"layer": 0, "block": "Q", "head": 1}
    found = matrix(made.store, "math", "code", **options, config=InterferenceConfig(form="full"))
    np.testing.assert_allclose(found.attrs["ridge"], 0.1 * values.mean(), rtol=1e-6)
    asked = InterferenceConfig(form="full", ridge=float(values.max()))
    np.testing.assert_allclose(
        matrix(made.store, "math", "code", **options, config=asked).attrs["ridge"], values.max(), rtol=1e-9
    )
    little = InterferenceConfig(form="full", ridge_rel=1e-9)
    with pytest.warns(UserWarning, match="smallest non-zero eigenvalue"):
        matrix(made.store, "math", "code", **options, config=little)
    result = interference(made.store, form="full", ridge_rel=1e-9)
    assert any("in 48 of 48 slices the damping is below" in note for note in result.warnings)
    assert not any("eigenvalue" in note for note in analysed("full").warnings)


def test_full_with_limited_pairs_takes_all_samples_for_fisher(made):
    """The first samples form pairs; F stays that of all."""
    whole = scores(made.store, "math", "code", 1, "O", 1, form="full")
    some = scores(made.store, "math", "code", 1, "O", 1, form="full", max_samples_per_task=5)
    np.testing.assert_array_equal(some, whole[:5, :5])


def test_bias_slices_take_every_form(made):
    """Biases of Q, K and V are slices of their own in every form."""
    for form in FORMS:
        frame = interference(made.store, form=form, part="bias").frame
        assert set(frame["block"]) == {"Q", "K", "V"}
        assert np.isfinite(frame["mean"]).all()


def test_natural_and_unsigned_differ_by_the_root_of_fisher():
    """Where F is constant, natural is unsigned over its square root."""
    rng = torch.Generator().manual_seed(0)
    h, g = torch.randn(3, 5, generator=rng), torch.randn(4, 5, generator=rng)
    fisher = torch.full((5,), 4.0)
    plain, natural = (interference_matrix(h, g, fisher, 1e-30, form=f) for f in ("unsigned", "natural"))
    torch.testing.assert_close(natural, plain / 2)
    with pytest.raises(ValueError, match="no form 'full'"):
        interference_matrix(h, g, fisher, 1.0, form="full")


def test_one_sample_per_task_works(layout, tmp_path):
    """Single samples score without an exception, and everything that cannot be told is NaN or warned of."""
    tasks = {name: make_task(layout, name, 1, seed) for seed, name in enumerate(("a", "b"))}
    found = write_store(tmp_path / "run.fs", layout, tasks).store
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in FORMS:
            result = interference(found, form=form, include_self=True)
            across = result.frame[result.frame["task_a"] != result.frame["task_b"]]
            assert np.isfinite(across["mean"]).all()
            assert across["p"].isna().all()
            pd.testing.assert_index_equal(result.frame.columns, across.columns)
            result.summary()
            result.to_json()
