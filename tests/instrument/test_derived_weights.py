"""Weights that are computed from other parameters: gradients of what is trained, as the loop has them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fisherscope as fs
from fisherscope.errors import AdapterError
from tests import models

STORED = ("fisher", fs.SampleGradients(parameters="all", dtype="float32", encoding="dense"))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is computed from other parameters"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.(weight|spectral)_norm` is deprecated"),
]


class Squared(nn.Module):
    """A parametrisation of the user's own, with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5]))

    def forward(self, raw):
        return raw * raw.abs() + self.scale * raw


def _twice(layer):
    parametrizations.spectral_norm(layer)
    parametrize.register_parametrization(layer, "weight", Squared())


def _pruned_twice(layer):
    prune.l1_unstructured(layer, "weight", amount=0.3)
    prune.ln_structured(layer, "weight", amount=0.2, n=2, dim=0)


CHANGES = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
    "prune_twice": _pruned_twice,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Squared()),
    "two": _twice,
    "old_weight_norm": nn.utils.weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
}


def changed(name, change, paths):
    model = models.build(models.named(name))
    for path in paths:
        CHANGES[change](model.get_submodule(path))
    # the vectors of a spectral norm are no singular vectors before some steps of training
    ids = torch.tensor([models.rows(1)[0]["input_ids"]])
    with torch.no_grad():
        for _ in range(20):
            model.train()(input_ids=ids)
    return model.eval()


def compare(model, rows, store):
    for i, one in enumerate(models.loop(model, rows)):
        for name in store.gradient_parameters:
            assert models.relative_error(store.gradients("a", name)[i], one[name], floor=1e-3) < 1e-5, name


@pytest.mark.parametrize("place", ["mlp.down_proj", "self_attn.q_proj"])
@pytest.mark.parametrize("change", CHANGES)
def test_raw_parameters_are_exact(change, place, tmp_path):
    """Both are selected by default, have their literal gradients, and the model is left as it was."""
    model, rows = changed("llama", change, [f"model.layers.0.{place}"]), models.rows(4)
    plain = {name for name, _ in models.build(models.named("llama")).named_parameters()}
    raw = {name for name, _ in model.named_parameters()} - plain
    state = {name: value.clone() for name, value in model.state_dict().items()}
    scope = fs.wrap(model)
    store = scope.collect({"a": rows}, tmp_path / "run.fs", extensions=STORED, quiet=True)
    assert raw <= set(scope.parameters)
    assert store.layout.attention
    compare(model, rows, store)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("change", ["prune", "weight_norm", "old_weight_norm"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_all_matrices(name, change, tmp_path):
    """A model that is pruned or normed throughout has no heads, and gradients of all that it trains."""
    plain = models.build(models.named(name))
    paths = [
        path
        for path, module in plain.named_modules()
        if type(module).__name__ in {"Linear", "Conv1D"} and ".0." in path
    ]
    model, rows = changed(name, change, paths), models.rows(4)
    raw = {n for n, _ in model.named_parameters()} - {n for n, _ in plain.named_parameters()}
    scope = fs.wrap(model)
    assert raw <= set(scope.parameters)
    store = scope.collect({"a": rows}, tmp_path / "run.fs", extensions=STORED, quiet=True)
    if name != "bert":
        compare(model, rows, store)


def test_a_pruned_table_that_is_tied(tmp_path):
    """Embeddings have no heads: nothing is warned of, and both uses of the parameter count."""
    model, rows = changed("qwen2-tied-mqa", "prune", ["model.embed_tokens"]), models.rows(4)
    scope = fs.wrap(model, parameters="all")
    compare(model, rows, scope.collect({"a": rows}, tmp_path / "run.fs", extensions=STORED, quiet=True))


def test_biases_beside_a_computed_weight(tmp_path):
    """The plain bias of such a layer comes from the same replay."""
    path = "model.layers.1.self_attn.k_proj"
    model, rows = changed("qwen2", "weight_norm", [path]), models.rows(4)
    scope = fs.wrap(model, parameters="all")
    assert f"{path}.bias" in scope.parameters
    compare(model, rows, scope.collect({"a": rows}, tmp_path / "run.fs", extensions=STORED, quiet=True))


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_said(change):
    """The warning names the layer and the cause, strict refuses with it, and none says quantised."""
    path = "model.layers.0.self_attn.q_proj"
    model = changed("llama", change, [path])
    with pytest.warns(UserWarning, match=f"the weight of {path} is computed from other") as said:
        fs.wrap(model)
    assert not any("quantis" in str(one.message) for one in said)
    with pytest.raises(AdapterError, match="is computed from other parameters") as refused:
        fs.wrap(model, strict=True)
    assert "quantis" not in str(refused.value)
