"""Which positions carry a conflict: against dense natural gradients, and against loops over positions."""

import re
from itertools import product

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fisherscope as fs
from fisherscope import telling
from fisherscope.analyses import AnalyzeConfig, ConflictConfig, run
from fisherscope.analyses.bootstrap import weights
from fisherscope.analyses.conflict.position_grams import Carried, PositionGram
from fisherscope.analyses.conflict.positions import carrying_positions, carrying_positions_of_pairs
from fisherscope.demo import model_path, planted_pairs, task_files
from fisherscope.errors import MemoryBudgetError, NotStoredError
from tests import models

FACTORED = ("fisher", fs.SampleGradients("attention", "factored", "float32"))
EUCLIDEAN = ConflictConfig(metric="euclidean")
TASKS = {"math": models.rows(6), "code": models.rows(5, seed=5)}
PAIR = ("math_1", "code_3")
# llama has four query heads and two kv heads; the Q, K and V of gpt2 are one parameter, and transposed
PLACES = [
    {},
    {"layer": 1},
    {"block": "V"},
    *({"layer": 1, "block": name} for name in "QKVO"),
    *({"layer": 0, "block": name, "head": 1} for name in "QKVO"),
    {"layer": 0, "block": "Q", "head": 3},
]


def collected(name, out, *extensions, **options):
    scope = fs.wrap(models.build(models.named(name)), parameters="attention")
    options = {"batch_size": 3, "quiet": True} | options
    return scope, scope.collect(TASKS, out, extensions=extensions, **options)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def store(request, tmp_path_factory):
    """Exact factors of a model's attention weights, and F in full shape."""
    return collected(request.param, tmp_path_factory.mktemp("positions") / "run.fs", *FACTORED)[1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model, its store of factors, and one of group values and F alone."""
    root = tmp_path_factory.mktemp("llama")
    scope, full = collected("llama", root / "full.fs", *FACTORED)
    return scope, full, collected("llama", root / "groups.fs", "fisher")[1]


def pieces(store, layer=None, block=None, head=None):
    """Head slices of a place, each with the partition of its block."""
    for attention, found in store.layout.head_blocks():
        if layer in (None, attention.layer) and block in (None, found.name):
            for number, piece in enumerate(found.weight):
                if head in (None, number):
                    yield found.weight, piece


def scale_of(store, partition, piece, config):
    """1 / sqrt(F + lam) of a slice, float64, from dense gradients: F pooled, lam of the whole block."""
    if config.metric == "euclidean":
        return torch.ones(1, dtype=torch.float64)
    pooled = 0
    for task in ("math", "code"):
        tokens = torch.tensor(store.samples(task)["tokens"].to_numpy())
        h = store.gradients(task, partition.parameter).double() / tokens.sqrt()[:, None, None]
        pooled = pooled + h.square().mean(0) / 2
    lam = config.ridge_rel * torch.quantile(partition.gather(pooled[None]), 0.5)
    return (piece.take(pooled[None])[0] + lam).rsqrt()


def natural(store, sample, place, config):
    """The natural gradient of a sample over a place, from its dense gradient, float64."""
    task, _, row = sample.rpartition("_")
    return torch.cat(
        [
            (piece.take(store.gradients(task, p.parameter, [int(row)]).double())[0] * scale).flatten()
            for p, piece in pieces(store, **place)
            for scale in [scale_of(store, p, piece, config)]
        ]
    )


def by_loop(store, place, config):
    """Inner products of every two position gradients of a pair, each formed as a matrix, float64."""
    total = 0
    for p, piece in pieces(store, **place):
        scale, every = scale_of(store, p, piece, config), []
        for sample in PAIR:
            task, _, row = sample.rpartition("_")
            found = store.per_sample(task, p.parameter, [int(row)])
            for t in range(found.positions):
                gradient = torch.outer(found.left[0, t].double(), found.right[0, t].double())
                every.append(piece.take(gradient[None])[0] * scale)
        gram = torch.zeros(len(every), len(every), dtype=torch.float64)
        for (t, first), (s, second) in product(enumerate(every), repeat=2):
            gram[t, s] = (first * second).sum()
        total = total + gram
    return total.numpy()


@pytest.mark.parametrize("config", [ConflictConfig(), EUCLIDEAN], ids=["natural", "euclidean"])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_contributions_add_up_to_the_cosine_of_dense_gradients(store, place, config):
    """On either side: of the whole model, a layer, a block, a head of Q, K, V and O."""
    u, v = (natural(store, sample, place, config) for sample in PAIR)
    expected = float(u @ v / (u.norm() * v.norm()))
    view = carrying_positions(store, *PAIR, **place, config=config, resamples=10)
    assert view.cosine == pytest.approx(expected, abs=1e-5)
    for side, sample in zip("ab", PAIR, strict=True):
        rows = view.frame[view.frame["side"] == side]
        assert rows["contribution"].sum() == pytest.approx(expected, abs=1e-5)
        assert set(rows["sample"]) == {sample}
    assert (view.source, view.metric) == ("store", config.metric)


@pytest.mark.parametrize("config", [ConflictConfig(), EUCLIDEAN], ids=["natural", "euclidean"])
@pytest.mark.parametrize(
    "place", [{}, {"layer": 0, "block": "K", "head": 1}, {"layer": 1, "block": "O"}], ids=str
)
def test_contributions_are_those_of_a_loop_over_pairs_of_positions(store, place, config):
    """Of each position, and of the most opposed pairs of positions, in order."""
    gram, view = by_loop(store, place, config), carrying_positions(store, *PAIR, **place, config=config)
    first = int((view.frame["side"] == "a").sum())
    shares = gram[:first, first:] / np.sqrt(gram[:first, :first].sum() * gram[first:, first:].sum())
    expected = np.concatenate([shares.sum(1), shares.sum(0)])
    np.testing.assert_allclose(view.frame["contribution"], expected, rtol=1e-4, atol=1e-5)
    negative = np.sort(shares[shares < 0])[:20]
    np.testing.assert_allclose(view.pairs["contribution"], negative, rtol=1e-4, atol=1e-5)
    for row in view.pairs.itertuples():
        assert shares[row.position_a, row.position_b] == pytest.approx(row.contribution, rel=1e-3, abs=1e-5)


def test_the_cosine_is_the_one_that_the_analysis_reports(store):
    """Over all attention weights."""
    result = run(store, ["conflict"], AnalyzeConfig())["conflict"]
    matrix = result.cosines("math", "code")
    expected = float(matrix.sel(sample_a=PAIR[0], sample_b=PAIR[1]))
    assert carrying_positions(store, *PAIR).cosine == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("budget", [17_000, 40_000, 1 << 30])
def test_tiles_change_nothing(budget):
    """Row by row, some rows at a time, or all at once."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(20, k, generator=generator) for k in (13, 30))
    scale = torch.rand(13, 30, generator=generator)
    gram = PositionGram(8, 12, budget)
    gram.add(left, right, scale)
    gram.add(left, right, None)
    token = (left[:, :, None] * right[:, None]).double()
    expected = sum(x.flatten(1) @ x.flatten(1).T for x in (token * scale, token))
    np.testing.assert_allclose(gram.values, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_several_pairs_are_those_one_by_one(store):
    """With F of each weight had once."""
    pairs = [PAIR, ("math_0", "math_1"), ("code_4", "math_1"), PAIR]
    for view, pair in zip(carrying_positions_of_pairs(store, pairs), pairs, strict=True):
        alone = carrying_positions(store, *pair)
        assert (view.sample_a, view.sample_b) == pair
        assert (view.cosine, view.low, view.high) == (alone.cosine, alone.low, alone.high)
        assert view.frame.equals(alone.frame)
    assert carrying_positions_of_pairs(store, []) == []


def carried(seed, positions, theta=-0.5, strength=5.0, size=100):
    """Two samples whose position gradients scatter around means with this cosine, with heavy tails."""
    rng = np.random.default_rng(seed)
    means = np.sqrt(strength * size / positions) * np.array([[1, 0], [theta, np.sqrt(1 - theta**2)]])
    rows = []
    for mean in means:
        gradients = rng.normal(size=(positions, size))
        gradients[:, :2] += mean
        rows.append(gradients * rng.lognormal(0, 0.5, size=(positions, 1)))
    both = np.concatenate(rows)
    return Carried(both @ both.T, positions), rows


def test_resampled_cosines_are_those_of_resampled_positions():
    """Against a loop that takes the positions and adds up their gradients."""
    found, (a, b) = carried(0, 7)
    rng = np.random.default_rng(1)
    drawn = [weights(7, 50, rng) for _ in "ab"]
    cosines = found.resampled(*drawn)
    for replicate in range(50):
        u, v = (
            sum(w * g for w, g in zip(each[replicate], x, strict=True))
            for each, x in zip(drawn, (a, b), strict=True)
        )
        assert cosines[replicate] == pytest.approx(u @ v / np.sqrt((u @ u) * (v @ v)), rel=1e-9)


def test_the_interval_is_the_percentiles_of_resamples_at_the_samples_own_length():
    """By a loop with the same draws; resamples are longer, by what all possible ones are on average."""
    found, (a, b) = carried(3, 4)
    factor = 1.0
    for x in (a, b):
        every = [sum(x[list(places)]) for places in product(range(4), repeat=4)]
        factor *= np.sqrt(np.mean([u @ u for u in every]) / (x.sum(0) @ x.sum(0)))
    rng = np.random.default_rng(9)
    cosines = found.resampled(weights(4, 200, rng), weights(4, 200, rng))
    expected = np.quantile((cosines * factor).clip(-1, 1), [0.05, 0.95])
    np.testing.assert_allclose(found.interval(0.9, 200, 9), expected, rtol=1e-9)
    assert found.interval(0.9, 200, 9) == found.interval(0.9, 200, 9)
    assert found.interval(0.9, 200, 9) != found.interval(0.9, 200, 10)


def test_the_interval_holds_the_cosine_and_covers_its_mean():
    """Plain percentiles of the resampled cosines lie nearer to 0 than the cosine, and miss the mean often."""
    found = [carried(seed, 50)[0] for seed in range(200)]
    mean = np.mean([each.cosine for each in found])
    ends = np.array([each.interval(0.95, 300, 0) for each in found])
    own = np.array([each.cosine for each in found])
    assert ((ends[:, 0] <= own) & (own <= ends[:, 1])).all()
    assert ((ends[:, 0] <= mean) & (mean <= ends[:, 1])).mean() >= 0.92
    plain = []
    for each in found:
        rng = np.random.default_rng(0)
        plain.append(
            np.quantile(each.resampled(weights(50, 300, rng), weights(50, 300, rng)), [0.025, 0.975])
        )
    plain = np.array(plain)
    assert ((plain[:, 0] <= mean) & (mean <= plain[:, 1])).mean() < 0.88


def test_views_are_the_same_every_time(store):
    """With one seed; another draws other positions."""
    views = [carrying_positions(store, *PAIR, seed=seed) for seed in (0, 0, 1)]
    assert (views[0].low, views[0].high) == (views[1].low, views[1].high)
    assert (views[0].low, views[0].high) != (views[2].low, views[2].high)
    assert views[0].frame.equals(views[2].frame)


def test_factors_of_the_model_do_as_well(llama):
    """From a store of group values and F: the same numbers, and where they came from."""
    scope, full, groups = llama
    factors = scope.factors(groups, PAIR)
    for place in ({}, {"layer": 1, "block": "O", "head": 3}, {"layer": 0, "block": "V"}):
        stored = carrying_positions(full, *PAIR, **place)
        again = carrying_positions(groups, *PAIR, **place, factors=factors)
        assert (stored.source, again.source) == ("store", "model")
        np.testing.assert_allclose(again.frame["contribution"], stored.frame["contribution"], atol=1e-5)
        assert (again.low, again.high) == pytest.approx((stored.low, stored.high), abs=1e-4)
    assert carrying_positions(full, *PAIR, factors=factors).source == "model"


def test_transposed_weights_of_the_model_are_turned(tmp_path):
    """transformers' Conv1D, where even a square weight has its axes the other way round."""
    scope, full = collected("gpt2", tmp_path / "run.fs", *FACTORED)
    stored, again = (carrying_positions(full, *PAIR, factors=f) for f in (None, scope.factors(full, PAIR)))
    np.testing.assert_allclose(again.frame["contribution"], stored.frame["contribution"], atol=1e-5)


def test_f_may_come_from_the_stored_gradients(tmp_path):
    """Without F in full shape it is the mean over stored gradients."""
    _, full = collected("llama", tmp_path / "full.fs", *FACTORED)
    _, small = collected("llama", tmp_path / "small.fs", fs.Fisher(shape="groups"), FACTORED[1])
    found = [carrying_positions(store, *PAIR) for store in (full, small)]
    np.testing.assert_allclose(found[0].frame["contribution"], found[1].frame["contribution"], atol=1e-5)


def test_positions_have_their_tokens(llama, tmp_path):
    """Ids as the store has them, texts where it has them, and a mark where the next token bears loss."""
    _, full, _ = llama
    frame = carrying_positions(full, *PAIR).to_frame()
    for side, sample in zip("ab", PAIR, strict=True):
        task, _, row = sample.rpartition("_")
        ids, labels = full.token_ids(task, int(row))
        rows = frame[frame["side"] == side]
        assert rows["token_id"].tolist() == ids.tolist()
        assert rows["position"].tolist() == list(range(len(ids)))
        assert rows["bears_loss"].tolist() == [*(labels[1:] != -100), False]
        assert rows["token"].tolist() == [None] * len(ids)
        assert rows["bears_loss"].sum() == full.samples(task)["tokens"][int(row)]


def test_labels_of_other_objectives_stand_elsewhere(tmp_path):
    """Beside their own positions (masked LM), in a sequence of their own (T5), or at none (classes)."""
    rows = models.rows(6)
    beside = [
        dict(r, labels=[-100 if t % 3 else token for t, token in enumerate(r["input_ids"])]) for r in rows
    ]
    options = {"extensions": FACTORED, "quiet": True}
    scope = fs.wrap(models.build(models.named("bert")), parameters="attention")
    store = scope.collect({"a": beside}, tmp_path / "masked.fs", **options)
    frame = carrying_positions(store, "a_1", "a_2").frame
    for side, row in (("a", 1), ("b", 2)):
        marks = frame[frame["side"] == side]["bears_loss"].tolist()
        assert marks == [t % 3 == 0 for t in range(len(rows[row]["input_ids"]))]

    classifier = models.Setting("bert", models.named("bert").config, "AutoModelForSequenceClassification")
    classes = [{"input_ids": r["input_ids"], "label": i % 2} for i, r in enumerate(rows)]
    scope = fs.wrap(models.build(classifier), parameters="attention")
    store = scope.collect({"a": classes}, tmp_path / "classes.fs", **options)
    frame = carrying_positions(store, "a_1", "a_2").frame
    assert not frame["bears_loss"].any()
    assert len(frame) == sum(len(rows[row]["input_ids"]) for row in (1, 2))


def test_both_sides_of_an_encoder_decoder_have_their_own_positions(tmp_path):
    """Input tokens for the encoder and the keys of cross attention, labels for all else; never mixed."""
    pairs = [
        {"input_ids": r["input_ids"], "target": [5 + i, 9, 4][: 2 + i % 2]}
        for i, r in enumerate(models.rows(5))
    ]
    scope = fs.wrap(models.build(models.named("t5")), parameters="attention")
    store = scope.collect({"a": pairs}, tmp_path / "run.fs", extensions=FACTORED, quiet=True)
    target = carrying_positions(store, "a_1", "a_2", stack="decoder")
    assert target.frame["token_id"].tolist() == pairs[1]["target"] + pairs[2]["target"]
    assert target.frame["bears_loss"].all()
    for place in ({"stack": "encoder"}, {"stack": "cross", "block": "K"}):
        source = carrying_positions(store, "a_1", "a_2", **place)
        assert source.frame["token_id"].tolist() == pairs[1]["input_ids"] + pairs[2]["input_ids"]
        assert not source.frame["bears_loss"].any()
    for place in ({}, {"stack": "cross"}):
        with pytest.raises(ValueError, match="some of these weights see the positions of the input"):
            carrying_positions(store, "a_1", "a_2", **place)


def test_images_have_no_tokens(tmp_path):
    """Patches are positions without ids; factors may come with the data."""
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tasks = {"a": [{"pixel_values": image, "label": i} for i, image in enumerate(images)]}
    scope = fs.wrap(models.build(models.named("vit")), parameters="attention")
    store = scope.collect(tasks, tmp_path / "run.fs", extensions=FACTORED, quiet=True)
    stored = carrying_positions(store, "a_0", "a_1")
    assert set(stored.frame["token_id"]) == {-1}
    again = carrying_positions(store, "a_0", "a_1", factors=scope.factors(store, ["a_0", "a_1"], tasks=tasks))
    np.testing.assert_allclose(again.frame["contribution"], stored.frame["contribution"], atol=1e-5)


def test_the_sentence_names_the_tokens_that_carry_a_planted_conflict(tmp_path):
    """The demo's contradicting answers: no conflict is carried by what both prompts share alone."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    scope = fs.wrap(AutoModelForCausalLM.from_pretrained(model_path()), tokenizer, parameters="attention")
    tasks = {name: str(path) for name, path in task_files().items() if name != "code"}
    store = scope.collect(
        tasks, tmp_path / "run.fs", extensions=("fisher", *FACTORED[1:]), max_samples=40, quiet=True
    )
    a, b = next(p for p in planted_pairs() if all(int(name.rpartition("_")[2]) < 40 for name in p))
    view = carrying_positions(store, a, b)
    texts = store.samples("math").set_index("id")["text"]
    assert "".join(view.frame[view.frame["side"] == "a"]["token"]) == texts[a]
    assert view.cosine < 0
    assert view.summary().startswith(
        f"{a} and {b}: cosine {view.cosine:+.2f} over all attention weights (95%"
    )
    lowest = view.frame.sort_values("contribution").iloc[0]
    assert f"{lowest['token']!r} (position {lowest['position']})" in view.summary()
    assert "it is lowered most by" in view.summary()
    assert set(view.pairs["token_a"]) <= set(texts[a])
    assert repr(view).startswith("<PositionView: math")


def test_a_pair_in_no_conflict_is_not_said_to_be_in_one(llama, capsys, monkeypatch):
    """The view divides a cosine and tests nothing: whatever the cosine, it speaks of no conflict. Where it
    takes long it says how long."""
    _, full, _ = llama
    views = [
        carrying_positions(full, *PAIR, layer=layer, block=block) for layer in (0, 1) for block in "QKVO"
    ]
    assert not [view for view in views if "conflict" in view.summary() or "conflict" in repr(view)]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(telling, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(telling, "_SECONDS_BEFORE_A_GUESS", 0.0)
    carrying_positions(full, *PAIR)
    assert re.match(r"carrying_positions: \d+% done, about \d+ s left\n", capsys.readouterr().err)
    carrying_positions(full, *PAIR, quiet=True)
    assert capsys.readouterr().err == ""


def test_the_sentence_says_where_and_what_is_missing(llama):
    """The place; positions without texts by their number; nothing where nothing is carried."""
    _, full, _ = llama
    assert (
        " over L0 K head 1 (90% interval "
        in carrying_positions(full, *PAIR, layer=0, block="K", head=1, confidence=0.9).summary()
    )
    alike = carrying_positions(full, "math_1", "math_1", layer=0, block="V", head=0)
    assert alike.cosine == pytest.approx(1)
    lowest = carrying_positions(full, *PAIR).frame.sort_values("contribution").iloc[0]
    assert f"position {lowest['position']}" in carrying_positions(full, *PAIR).summary()


def test_a_sample_without_a_gradient_has_no_cosine(tmp_path):
    """Where the loss is taken of something before the layer, as F is 0 there: NaN, and a sentence."""

    def loss(model, batch):
        hidden = model.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        ).hidden_states[1]
        return (hidden.float() * batch.attention_mask.unsqueeze(2)).square().sum((1, 2))

    scope = fs.wrap(models.build(models.named("llama")), parameters="attention")
    store = scope.collect(
        {"a": models.rows(4)}, tmp_path / "run.fs", extensions=FACTORED, objective=loss, quiet=True
    )
    factors = scope.factors(store, ["a_0", "a_3"], objective=loss)
    view = carrying_positions(store, "a_0", "a_3", layer=1, block="Q", factors=factors)
    assert np.isnan([view.cosine, view.low, view.high]).all()
    assert view.frame["contribution"].isna().all()
    assert len(view.pairs) == 0
    assert "no cosine over L1 Q, because one of them has no gradient there" in view.summary()


def test_what_is_not_there_is_named(llama, tmp_path):
    """Samples, places, factors, F: each error says what to do."""
    scope, full, groups = llama
    for name in ("math_6", "math_x", "nothing_0", "math"):
        with pytest.raises(KeyError, match=f"no sample '{name}'.*ids look like"):
            carrying_positions(full, name, "code_0")
    with pytest.raises(ValueError, match="give layer= and block="):
        carrying_positions(full, *PAIR, head=0)
    with pytest.raises(ValueError, match="give layer= and block="):
        carrying_positions(full, *PAIR, block="Q", head=0)
    with pytest.raises(IndexError, match="has 2 pieces, asked for 2"):
        carrying_positions(full, *PAIR, layer=0, block="K", head=2)
    for place in ({"layer": 2}, {"block": "X"}, {"stack": "encoder"}):
        with pytest.raises(KeyError, match="no weights of"):
            carrying_positions(full, *PAIR, **place)
    for options in ({"resamples": 0}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            carrying_positions(full, *PAIR, **options)
    with pytest.raises(
        NotStoredError, match=r'SampleGradients\(encoding="factored"\).*scope\.factors\(store, '
    ):
        carrying_positions(groups, *PAIR)
    factors = scope.factors(groups, PAIR)
    with pytest.raises(NotStoredError, match="of sample code_3"):
        carrying_positions(groups, *PAIR, factors={"math_1": factors["math_1"]})
    with pytest.raises(ValueError, match=r"the sample has .* positions"):
        carrying_positions(groups, "math_0", "code_3", factors={**factors, "math_0": factors["math_1"]})
    with pytest.raises(MemoryBudgetError, match="inner products of"):
        carrying_positions(full, *PAIR, memory_budget=1000)


def test_f_that_is_not_there_is_named(tmp_path):
    """A store of group values without F in full shape still has the Euclidean metric."""
    scope, store = collected("llama", tmp_path / "run.fs", fs.Fisher(shape="groups"))
    factors = scope.factors(store, PAIR)
    with pytest.raises(NotStoredError, match=r'Fisher\(shape="full"\).*euclidean'):
        carrying_positions(store, *PAIR, factors=factors)
    assert carrying_positions(store, *PAIR, factors=factors, config=EUCLIDEAN).source == "model"


def test_samples_whose_gradients_were_left_out_are_named(tmp_path):
    """SampleGradients(max_samples=...) keeps those of the first ones."""
    kept = fs.SampleGradients("attention", "factored", "float32", max_samples=3)
    scope, store = collected("llama", tmp_path / "run.fs", "fisher", kept)
    with pytest.raises(NotStoredError, match="those of this sample were left out"):
        carrying_positions(store, "math_1", "code_4")
    view = carrying_positions(store, "math_1", "code_4", factors=scope.factors(store, ["code_4"]))
    assert view.source == "model"
