"""A model that changes between wrap and collect: refused where its parts change, followed where values do."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fisherscope as fs
from fisherscope.errors import AdapterError, FisherscopeError, ModelChangedError
from tests import models

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
STORED = ("fisher", fs.SampleGradients(parameters="all", dtype="float32", encoding="dense"))


def _add_adapter(model):
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


def _resize(model):
    model.resize_token_embeddings(models.VOCABULARY + 3)


def _replace_head(model):
    model.lm_head = nn.Linear(32, models.VOCABULARY, bias=False)


def _replace_layer(model):
    model.model.layers[1] = type(model.model.layers[1])(model.config, 1)


def _rename(model):
    attention = model.model.layers[0].self_attn
    attention.query = attention.q_proj
    del attention.q_proj


def _reshape(model):
    down = model.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(torch.zeros(32, 24))


def _tie(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def _drop_layer(model):
    del model.model.layers[1]


CHANGES = {
    _add_adapter: r"q_proj is another module.*base_layer\.weight is new",
    _resize: r"embed_tokens",
    _replace_head: r"lm_head is another module",
    _replace_layer: r"model\.layers\.1 is another module",
    _rename: r"query\.weight is new.*q_proj\.weight is gone",
    _reshape: r"down_proj\.weight has another shape",
    _tie: r"embed_tokens\.weight is tied",
    _drop_layer: r"model\.layers\.1\..*is gone",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_parts_that_change_are_named(change, tmp_path):
    """Every call that runs the model says what changed and what to do, and writes nothing."""
    model, rows = models.build(models.named("llama")), models.rows(3)
    scope = fs.wrap(model)
    store = scope.collect({"a": rows}, tmp_path / "before.fs", quiet=True)
    change(model)
    calls = (
        lambda: scope.collect({"a": rows}, tmp_path / "run.fs", quiet=True),
        lambda: scope.estimate({"a": rows}),
        lambda: scope.gradients(store, ["a_0"]),
        lambda: scope.factors(store, ["a_0"]),
    )
    for call in calls:
        with pytest.raises(ModelChangedError, match=f"{CHANGES[change]}.*call fisherscope.wrap again$"):
            call()
    assert not (tmp_path / "run.fs").exists()


@pytest.mark.parametrize("change", ["merge", "disable", "delete", "unload", "second"])
def test_adapters_that_change_are_named(change, tmp_path):
    """Adapters that are merged, switched off, deleted, taken out or joined by another ask for a new wrap."""
    peft = get_peft_model(models.build(models.named("llama")), LoraConfig(r=2, target_modules=["q_proj"]))
    scope = fs.wrap(peft)
    if change == "merge":
        peft.merge_adapter()
    elif change == "disable":
        peft.base_model.disable_adapter_layers()
    elif change == "delete":
        peft.delete_adapter("default")
    elif change == "unload":
        peft.unload()
    else:
        peft.add_adapter("other", LoraConfig(r=3, target_modules=["v_proj"]))
    with pytest.raises(ModelChangedError, match=r"call fisherscope\.wrap again$"):
        scope.collect({"a": models.rows(3)}, tmp_path / "run.fs", quiet=True)


def test_a_model_that_lost_its_weights(tmp_path):
    """One that went to the meta device is refused for that, in the words of wrap."""
    model = models.build(models.named("llama"))
    scope = fs.wrap(model)
    model.to("meta")
    with pytest.raises(AdapterError, match="have no data"):
        scope.collect({"a": models.rows(3)}, tmp_path / "run.fs", quiet=True)


def _load(model, other):
    model.load_state_dict(other.state_dict())


def _assign(model, other):
    model.load_state_dict(other.state_dict(), assign=True)


def _new_parameters(model, other):
    for name, parameter in other.named_parameters():
        path, _, local = name.rpartition(".")
        setattr(model.get_submodule(path), local, nn.Parameter(parameter.detach().clone()))


@pytest.mark.parametrize("change", [_load, _assign, _new_parameters], ids=lambda change: change.__name__)
def test_values_that_change_are_followed(change, tmp_path):
    """Weights that are loaded or replaced under the same names give the gradients of the loop with them."""
    model, other = (models.build(models.named("llama"), seed=seed) for seed in (0, 1))
    scope, rows = fs.wrap(model), models.rows(4)
    change(model, other)
    store = scope.collect({"a": rows}, tmp_path / "run.fs", extensions=STORED, quiet=True)
    for i, one in enumerate(models.loop(other, rows)):
        for name in store.gradient_parameters:
            assert models.relative_error(store.gradients("a", name)[i], one[name], floor=1e-3) < 1e-5, name


def test_a_cast_is_followed(tmp_path):
    """A model in float64 gives what its own loop gives."""
    model, rows = models.build(models.named("llama")), models.rows(4)
    scope = fs.wrap(model)
    model.to(torch.float64)
    store = scope.collect({"a": rows}, tmp_path / "run.fs", extensions=STORED, quiet=True)
    for i, one in enumerate(models.loop(model, rows)):
        for name in store.gradient_parameters:
            assert models.relative_error(store.gradients("a", name)[i], one[name], floor=1e-3) < 1e-5, name


def test_the_error_is_one_of_the_package():
    """Whoever catches the package's errors catches this one."""
    assert issubclass(ModelChangedError, FisherscopeError)
