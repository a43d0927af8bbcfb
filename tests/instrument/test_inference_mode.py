"""Models, scopes and rows made inside of ``torch.inference_mode`` and used outside, or the reverse."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fisherscope as fs
from fisherscope.errors import AdapterError
from tests import models

STORED = ("fisher", fs.SampleGradients(parameters="all", dtype="float32", encoding="dense"))


def made_inside(name):
    with torch.inference_mode():
        return models.build(models.named(name), layers=1)


def held(model):
    """Every tensor that a model holds, as the objects that they are."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    attributes = {
        f"{path}.{key}": value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }
    return {name: id(tensor) for name, tensor in (*named, *attributes.items())}


def gradients(scope, rows, out):
    store = scope.collect({"a": rows}, out, extensions=STORED, quiet=True)
    return {name: store.gradients("a", name) for name in store.gradient_parameters}


@pytest.mark.parametrize("name", ["llama", "qwen2-tied-mqa", "gemma2", "qwen3_moe"])
def test_a_model_that_was_made_inside(name, tmp_path):
    """Its gradients are those of the loop over the same model made outside, and it is left as it was."""
    model, rows = made_inside(name), models.rows(4)
    before = held(model)
    found = gradients(fs.wrap(model, parameters="all"), rows, tmp_path / "run.fs")
    expected = models.loop(models.build(models.named(name), layers=1), rows)
    for parameter, each in found.items():
        for i, one in enumerate(expected):
            assert models.relative_error(each[i], one[parameter], floor=1e-3) < 1e-5, parameter
    assert held(model) == before
    assert all(p.is_inference() and p.requires_grad for p in model.parameters())


def test_the_same_run(tmp_path):
    """A store that a model from inside began goes on with one from outside, and computes samples again."""
    rows = models.rows(6)
    begun = fs.wrap(made_inside("qwen2")).collect({"a": rows[:3]}, tmp_path / "run.fs", quiet=True)
    scope = fs.wrap(models.build(models.named("qwen2"), layers=1))
    assert scope.collect({"a": rows}, tmp_path / "run.fs", quiet=True).n("a") == 6
    name = begun.gradient_parameters[0]
    again = fs.wrap(made_inside("qwen2")).gradients(tmp_path / "run.fs", ["a_1"], parameters=[name])
    assert torch.equal(again[name], scope.gradients(tmp_path / "run.fs", ["a_1"], parameters=[name])[name])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_buffers_that_were_made_inside(tmp_path):
    """The tables of rotary positions alone may be inference tensors, under checkpointing, too."""
    model, rows = models.build(models.named("llama"), layers=1), models.rows(4)
    expected = gradients(fs.wrap(model), rows, tmp_path / "plain.fs")
    rotary = model.model.rotary_emb
    with torch.inference_mode():
        rotary.inv_freq = rotary.inv_freq.clone()
    model.gradient_checkpointing_enable()
    found = gradients(fs.wrap(model), rows, tmp_path / "run.fs")
    assert rotary.inv_freq.is_inference()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("choice", ["linear", "all"])
def test_wrapped_on_one_side_and_collected_on_the_other(choice, tmp_path):
    """It does not matter where a scope is made, nor where it collects."""
    rows, model = models.rows(4), models.build(models.named("qwen2"), layers=1)
    outside = fs.wrap(model, parameters=choice)
    with torch.inference_mode():
        inside = fs.wrap(model, parameters=choice)
        found = gradients(outside, rows, tmp_path / "first.fs")
    other = gradients(inside, rows, tmp_path / "second.fs")
    expected = gradients(outside, rows, tmp_path / "plain.fs")
    for name in expected:
        assert torch.equal(found[name], expected[name])
        assert torch.equal(other[name], expected[name])
        assert not found[name].is_inference()


def test_images_that_were_made_inside(tmp_path):
    """Pixels out of a pipeline that runs in inference mode are pixels."""
    scope = fs.wrap(models.build(models.named("vit"), layers=1), parameters="all")
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = gradients(
        scope, [{"pixel_values": image, "label": 1} for image in pixels], tmp_path / "plain.fs"
    )
    with torch.inference_mode():
        rows = [{"pixel_values": image, "label": torch.tensor(1)} for image in pixels.clone()]
    found = gradients(scope, rows, tmp_path / "run.fs")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_inference_tensor_in_the_objective(tmp_path):
    """It can have no part in a backward pass: the error says so, and the model is as before."""
    with torch.inference_mode():
        weights = torch.ones(models.VOCABULARY)

    def objective(model, batch):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits * weights
        return F.cross_entropy(
            logits[:, :-1].mT, batch.labels[:, 1:], ignore_index=-100, reduction="none"
        ).sum(1)

    model = models.build(models.named("qwen2"), layers=1)
    before = held(model)
    with pytest.raises(AdapterError, match=r"made under torch\.inference_mode takes part in the loss"):
        fs.wrap(model).collect({"a": models.rows(3)}, tmp_path / "run.fs", objective=objective, quiet=True)
    assert held(model) == before
    assert not (tmp_path / "run.fs").exists()
