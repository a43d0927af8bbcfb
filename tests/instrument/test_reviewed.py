"""Corners that once went wrong."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import fisherscope as fs
from fisherscope.errors import AdapterError, DataError, FisherscopeError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.objectives import CAUSAL_LM
from fisherscope.instrument.objectives.content import parts_of
from tests import models
from tests.instrument.test_memory import Cramped
from tests.instrument.test_objectives import BART, CASES, SMALL, make

EXACT = (fs.Fisher(), fs.SampleGradients(parameters="all", dtype="float32"))


def with_a_cache(model: Any, batch: Batch) -> Tensor:
    """The loss as people write it: the model makes a cache."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
    return F.cross_entropy(logits.mT, batch.labels[:, 1:], reduction="none").sum(1)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-mqa"])
def test_checkpointed_layers_see_no_cache(name: str, reentrant: bool, tmp_path: Path) -> None:
    """A cache would be filled a second time when a layer is run again."""
    model = models.build(models.named(name))
    rows = [{"input_ids": list(range(3 + i, 11 + i))} for i in range(4)]
    expected = models.loop(model, [{**row, "labels": row["input_ids"]} for row in rows])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    store = fs.wrap(model).collect(
        {"a": rows}, tmp_path / "run.fs", extensions=EXACT, objective=with_a_cache, batch_size=3, quiet=True
    )
    floor = 1e-3 * max(float(g.abs().max()) for sample in expected for g in sample.values())
    for parameter in store.parameters:
        g = torch.stack([sample[parameter] for sample in expected])
        assert models.relative_error(store.gradients("a", parameter), g, floor=floor) <= 1e-5, parameter


@pytest.mark.parametrize("labels", ["data", "sampled"])
def test_nothing_is_left_of_a_batch(labels: Any, tmp_path: Path) -> None:
    """Modules that are run again, too: there are as many tensors after fourteen batches as after six."""
    model = models.build(models.named("mixtral"))
    scope, counts = fs.wrap(model, parameters="all"), []

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    def watched(model: nn.Module, batch: Batch) -> Any:
        counts.append(alive())
        return CAUSAL_LM.predict(model, batch)

    # of all that was there before nothing is looked at
    gc.freeze()
    try:
        scope.collect(
            {"a": models.rows(14)},
            tmp_path / "run.fs",
            extensions=(fs.Fisher(labels=labels),),
            objective=watched,
            batch_size=1,
            quiet=True,
        )
    finally:
        gc.unfreeze()
    # what comes before the batches looks at samples and at the model, and proves the first batch
    assert max(counts[-4:]) <= max(counts[-12:-8]) + 8


def test_float64_rules_with_tables(tmp_path: Path) -> None:
    """Rows of embeddings, too."""
    model, rows = models.build(models.named("llama")), models.rows(3)
    scope = fs.wrap(model, parameters="all")
    store = scope.collect(
        {"a": rows}, tmp_path / "run.fs", compute_dtype="float64", extensions=EXACT, quiet=True
    )
    expected = models.loop(model, rows)
    name = "model.embed_tokens.weight"
    g = torch.stack([sample[name] for sample in expected])
    assert models.relative_error(store.gradients("a", name), g) <= 1e-5


class Processor:
    """The least that an image processor is."""

    def __call__(self, images: Any, return_tensors: str) -> dict[str, Tensor]:
        assert return_tensors == "pt"
        return {"pixel_values": torch.as_tensor(images).unsqueeze(0) / 2}

    def to_dict(self) -> dict[str, float]:
        return {"rescale": 0.5}


def test_images_through_a_processor(tmp_path: Path) -> None:
    """In place of the tokenizer: rows of images, and a fingerprint of its settings."""
    _, build, make_rows = CASES["vit"]
    model, rows = build(), make_rows(3)
    scope = fs.wrap(model, Processor())
    raw = [{"image": 2 * row["pixel_values"], "label": row["label"]} for row in rows]
    store = scope.collect({"a": raw}, tmp_path / "run.fs", extensions=EXACT, quiet=True)
    plain = fs.wrap(model).collect({"a": rows}, tmp_path / "plain.fs", extensions=EXACT, quiet=True)
    assert list(store.samples("a")["key"]) == list(plain.samples("a")["key"])
    assert store.header.fingerprint["tokenizer"] is not None


def test_halving_goes_on_while_anything_can_be_halved(tmp_path: Path) -> None:
    """Late in a run memory suffices for one sample only: earlier, larger batches are done again, in parts."""
    rows = models.rows(18)
    scope = fs.wrap(models.build(models.named("llama")), parameters="all")
    expected = scope.collect({"a": rows}, tmp_path / "whole.fs", extensions=EXACT, batch_size=8, quiet=True)
    with pytest.warns(UserWarning, match="memory ran out"):
        found = scope.collect(
            {"a": rows},
            tmp_path / "halved.fs",
            extensions=EXACT,
            batch_size=8,
            objective=Cramped(1, after=5),
            quiet=True,
        )
    for name in expected.parameters:
        f = expected.fisher("a", name)
        assert models.relative_error(found.fisher("a", name), f, floor=1e-9) <= 1e-5, name


def collect(case: str, rows: Any, out: Path, **options: Any) -> fs.ContributionStore:
    return fs.wrap(CASES[case][1]()).collect({"a": rows}, out, quiet=True, **options)


@pytest.mark.parametrize(
    ("case", "row", "message"),
    [
        ("bert-several-classes", {"input_ids": [3, 4], "labels": [1, 0]}, "2 labels for 5 classes"),
        ("bert-tokens", {"tokens": ["a"], "labels": 3}, "must be a list with one class per word"),
        ("bert-class", {"input_ids": [3, 4], "label": -1}, "classes are 0 or more"),
        ("bert-class", {"input_ids": [3, 4], "label": 5}, r"list of classes has 5 entries \(0 to 4\)"),
        ("bert-class", {"input_ids": [3, 4], "label": "X"}, "knows no class 'X'"),
        ("bert-class", {"input_ids": [3, 4]}, 'needs a "label"'),
        ("bart", {"input_ids": [3, 4], "labels": [5] * 70}, "70 tokens, and the model takes 64"),
        ("bart", {"input_ids": [3, 4] * 40, "labels": [5]}, "80 tokens, and the model takes 64"),
        ("bart", {"input_ids": [3, 4]}, '"target"'),
        ("vit", {"pixel_values": torch.zeros(16, 16), "label": 1}, r"\[channels, height, width\]"),
        ("vit", {"label": 1}, 'neither "pixel_values" nor "image"'),
        ("bert-masked", {"text": "words"}, "needs a tokenizer"),
        ("bert-masked", {"input_ids": [5, 6, 7]}, "no mask token"),
    ],
)
def test_rows_that_do_not_fit_are_named(case: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The row, and what to do, before anything is written."""
    with pytest.raises(DataError, match=message) as error:
        collect(case, [row], tmp_path / "run.fs")
    assert "a_0" in str(error.value)
    assert not (tmp_path / "run.fs").exists()


def test_rows_beyond_a_table_with_an_offset(tmp_path: Path) -> None:
    """OPT keeps two rows before the first position."""
    scope = fs.wrap(models.build(models.named("opt")))
    with pytest.raises(DataError, match="80 tokens, and the model takes 64"):
        scope.collect({"a": [{"input_ids": [5] * 80}]}, tmp_path / "run.fs", quiet=True)


def test_targets_count_in_the_plan() -> None:
    """Short sources with long targets make small batches."""
    scope = fs.wrap(make("BartForConditionalGeneration", "BartConfig", **BART)())
    short = [{"input_ids": [3, 4, 5], "labels": [5, 6]} for _ in range(20)]
    long = [{"input_ids": [3, 4, 5], "labels": [5, 6] * 30} for _ in range(20)]
    from fisherscope.instrument.options import CollectOptions

    def plan(rows: Any) -> Any:
        return scope._planner.plan({"a": rows}, CollectOptions(extensions=(), memory_budget=2_000_000))

    assert max(map(len, plan(long).tasks[0].batches)) < max(map(len, plan(short).tasks[0].batches))


@pytest.mark.filterwarnings("ignore:no adapter is registered")
def test_models_that_cannot_be_collected_from_say_so(tmp_path: Path) -> None:
    """No embedding of the input, a head for something else, a regression."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    model = transformers.ResNetForImageClassification(config)
    rows = [{"pixel_values": torch.zeros(3, 16, 16), "label": 1}] * 2
    with pytest.raises(AdapterError, match="does not say where its input is embedded"):
        fs.wrap(model, parameters=["*convolution*"]).collect({"a": rows}, tmp_path / "a.fs", quiet=True)
    text = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 2
    with pytest.raises(FisherscopeError, match="no decoder of its own"):
        fs.wrap(models.build(models.named("llama"))).collect(
            {"a": text}, tmp_path / "b.fs", objective="seq2seq", quiet=True
        )
    with pytest.raises(FisherscopeError, match="its head is for another objective"):
        collect("bert-class", text, tmp_path / "c.fs", objective="causal_lm")
    one = make("BertForSequenceClassification", "BertConfig", **(SMALL | {"num_labels": 1}))()
    with pytest.raises(FisherscopeError, match="a regression"):
        fs.wrap(one).collect({"a": [{"input_ids": [3, 4], "label": 0}] * 2}, tmp_path / "d.fs", quiet=True)


@pytest.mark.filterwarnings("ignore:no adapter is registered", "ignore:.*chosen parameters are not instr")
def test_swin_and_routed_linears(tmp_path: Path) -> None:
    """An embedding that returns several tensors; experts that are given other rows than those of samples."""
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, num_labels=3
    )
    model = transformers.SwinForImageClassification(config)
    rows = [{"pixel_values": torch.randn(3, 16, 16), "label": i} for i in range(3)]
    scope = fs.wrap(model)
    assert scope.collect({"a": rows}, tmp_path / "a.fs", extensions=("fisher",), quiet=True).is_complete("a")
    switch = transformers.SwitchTransformersConfig(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=3,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, vocab_size=61, decoder_start_token_id=0,
    )  # fmt: skip
    scope = fs.wrap(transformers.SwitchTransformersForConditionalGeneration(switch))
    pairs = [{"input_ids": [3, 4, 5, 6], "labels": [5, 6, 7]}, {"input_ids": [8, 4], "labels": [9]}]
    one, two = (
        scope.collect({"a": pairs}, tmp_path / f"{n}.fs", extensions=EXACT, batch_size=n, quiet=True)
        for n in (1, 2)
    )
    floor = 1e-3 * max(float(one.gradients("a", name).abs().max()) for name in one.parameters)
    for name in one.parameters:
        expected = one.gradients("a", name)
        assert models.relative_error(two.gradients("a", name), expected, floor=floor) <= 1e-5, name


def test_identity_covers_state() -> None:
    """Objects with attributes, methods, and functions that are closed over."""

    class Scaled:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, model: Any, batch: Any) -> Any:
            return self.factor * CAUSAL_LM.losses(model, batch)

        def loss(self, model: Any, batch: Any) -> Any:
            return self(model, batch)

    def around(inner: Any) -> Any:
        return lambda model, batch: 1.0 * inner(model, batch)

    one, same, other = Scaled(1.0), Scaled(1.0), Scaled(2.0)
    assert parts_of(one) == parts_of(same) != parts_of(other)
    assert parts_of(one.loss) == parts_of(same.loss) != parts_of(other.loss)
    assert parts_of(around(one)) == parts_of(around(same)) != parts_of(around(other))


def test_predictions_are_checked() -> None:
    """In the order of samples, with shapes that fit, in float32 at least."""
    logits, targets = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
    fs.Predictions(logits, targets, torch.tensor([0, 0, 1]))
    with pytest.raises(FisherscopeError, match="in the order of their samples"):
        fs.Predictions(logits, targets, torch.tensor([1, 0, 0]))
    with pytest.raises(FisherscopeError, match=r"logits \[m, classes\]"):
        fs.Predictions(logits, targets[:2], torch.tensor([0, 0, 1]))
    with pytest.raises(FisherscopeError, match="make them float32"):
        fs.Predictions(logits.half(), targets, torch.tensor([0, 0, 1]))


def test_a_detached_loss_is_named(tmp_path: Path) -> None:
    """And not left to autograd to complain about."""
    scope = fs.wrap(models.build(models.named("llama")))
    with pytest.raises(FisherscopeError, match="must not detach"):
        scope.collect(
            {"a": models.rows(2)},
            tmp_path / "run.fs",
            objective=lambda model, batch: CAUSAL_LM.losses(model, batch).detach(),
            quiet=True,
        )


def test_hooks_on_norms_see_the_models_own_calls(tmp_path: Path) -> None:
    """The rule looks at a norm without calling it through its hooks."""
    model = models.build(models.named("llama"))
    norm = model.get_submodule("model.layers.0.input_layernorm")
    weights = norm.weight.detach().clone()
    seen: list[bool] = []
    norm.register_forward_hook(lambda module, *_: seen.append(torch.equal(module.weight, weights)))
    fs.wrap(model, parameters="all").collect({"a": models.rows(2)}, tmp_path / "run.fs", quiet=True)
    assert seen
    assert all(seen)
