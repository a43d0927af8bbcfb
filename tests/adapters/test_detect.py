"""Heads of models that nobody registered: found from the structure, or honestly not found."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fisherscope as fs
from fisherscope.adapters import registry, resolve
from fisherscope.adapters.build import Stack
from fisherscope.adapters.patterns import Separate
from fisherscope.errors import AdapterError
from fisherscope.layout import ModelLayout
from tests import models

EXACT = (fs.Fisher(), fs.SampleGradients(parameters="all", dtype="float32"))
TOKENS = {"vocab_size": models.VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no adapter had ever been written."""
    registry.known_model_types()
    monkeypatch.setattr(registry, "_adapters", {})


def _found(layout: ModelLayout) -> Any:
    """What detection can know: heads and channels; a sink is none of its business."""
    attention = [
        replace(a, module="", blocks=tuple(b for b in a.blocks if b.name != "sink")) for a in layout.attention
    ]
    mlps = [(m.stack, m.layer, {frozenset(p.parameter for p in m.weights)}, m.channels) for m in layout.mlps]
    return attention, sorted(map(str, mlps))


@pytest.mark.usefixtures("nothing_registered")
@pytest.mark.parametrize(
    "setting", [s for s in models.ALL if s.name not in {"codegen", "qwen3_next"}], ids=lambda s: s.name
)
def test_structure_alone_gives_what_adapters_say(
    setting: models.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its adapter every family comes out as with it: heads, groups, couplings, gates and channels."""
    model = models.build(setting)
    found = resolve(model, strict=True)
    assert found.source == "detected"
    monkeypatch.undo()
    assert _found(found) == _found(resolve(model))


@pytest.mark.usefixtures("nothing_registered")
def test_layers_without_heads_are_named_once() -> None:
    """A hybrid model: gated heads where there is attention, one warning that names the other layers."""
    model = models.build(models.named("qwen3_next"))
    with pytest.warns(UserWarning, match=r"in 2 of its modules \(model\.layers\.1, \.\.\.\)") as caught:
        layout = resolve(model)
    assert len(caught) == 1
    assert [(a.layer, a.has("gate")) for a in layout.attention] == [(0, True), (2, True)]
    assert {r.layer for r in layout.rows} >= {1, 3}


def _bart() -> transformers.PretrainedConfig:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
    sizes = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 24,
    }
    return transformers.BartConfig(**sizes, **heads, **TOKENS, max_position_embeddings=64)


Case = tuple[str, Callable[[], transformers.PretrainedConfig], list[tuple[str, int, int]]]
_COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
UNREGISTERED: dict[str, Case] = {
    "xglm": (
        "AutoModelForCausalLM",
        lambda: transformers.XGLMConfig(d_model=32, num_layers=2, attention_heads=4, ffn_dim=40, **TOKENS),
        [("decoder", 4, 4)] * 2,
    ),
    "biogpt": (
        "AutoModelForCausalLM",
        lambda: transformers.BioGptConfig(**_COMMON, **TOKENS),
        [("decoder", 4, 4)] * 2,
    ),
    "gpt_bigcode": (
        "AutoModelForCausalLM",
        lambda: transformers.GPTBigCodeConfig(**_GPT, **TOKENS, multi_query=True),
        [("decoder", 4, 1)] * 2,
    ),
    "openai-gpt": (
        "AutoModelForCausalLM",
        lambda: transformers.OpenAIGPTConfig(**_GPT, vocab_size=models.VOCABULARY),
        [("decoder", 4, 4)] * 2,
    ),
    "persimmon": (
        "AutoModelForCausalLM",
        lambda: transformers.PersimmonConfig(**_COMMON, **TOKENS),
        [("decoder", 4, 4)] * 2,
    ),
    "helium": (
        "AutoModelForCausalLM",
        lambda: transformers.HeliumConfig(**_COMMON, **TOKENS, num_key_value_heads=2, head_dim=8),
        [("decoder", 4, 2)] * 2,
    ),
    "bart": ("AutoModelForSeq2SeqLM", _bart, [("encoder", 4, 4)] * 2 + [("decoder", 2, 2), ("cross", 2, 2)]),
    "distilbert": (
        "AutoModelForMaskedLM",
        lambda: transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=40, **TOKENS),
        [("encoder", 4, 4)] * 2,
    ),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # of older versions, on import
@pytest.mark.parametrize("model_type", UNREGISTERED)
def test_unregistered_families_are_detected(model_type: str) -> None:
    """Eight families that no adapter describes: every head of every layer is confirmed, without a warning."""
    auto, config, expected = UNREGISTERED[model_type]
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config())
    assert model_type not in registry.known_model_types()
    layout = resolve(model, verify="all", strict=True)
    assert layout.source == "detected"
    assert [(a.stack, a.n_heads, a.n_kv_heads) for a in layout.attention] == expected
    assert len(layout.mlps) == sum(stack != "cross" for stack, *_ in expected)
    assert not layout.rows


UNCONFIRMED = {
    # a norm over all heads between attention and O
    "bitnet": lambda: transformers.BitNetConfig(**_COMMON, **TOKENS, num_key_value_heads=2),
    # no attention at all
    "mamba": lambda: transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **TOKENS),
}


@pytest.mark.filterwarnings("ignore:The fast path is not available")
@pytest.mark.parametrize("model_type", UNCONFIRMED)
def test_what_cannot_be_confirmed_works_by_module_and_row(model_type: str, tmp_path: Path) -> None:
    """One clear warning; parameters and their rows are collected, exactly; strict makes it an error."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(UNCONFIRMED[model_type]()).eval()
    with pytest.raises(AdapterError, match=rf"no adapter is registered for model_type '{model_type}'"):
        fs.wrap(model, strict=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scope = fs.wrap(model)
    texts = [str(w.message) for w in caught if "fisherscope" in str(w.message)]
    assert len(texts) == 1
    assert re.search(r"modules and rows.*fisherscope\.adapters\.register", texts[0])
    reasons = set(scope.coverage().query("selected and not covered")["reason"])
    # later versions of Mamba multiply with the weight of dt_proj without calling it: no hook would see that
    assert reasons <= ({"used without a call of its module"} if model_type == "mamba" else set())
    assert scope.layout.source == "modules"
    assert not scope.layout.attention
    assert "0 attention layers" in repr(scope)
    data = models.rows(4)
    store = scope.collect({"a": data}, tmp_path / "run.fs", extensions=EXACT, batch_size=4, quiet=True)
    expected = models.loop(model, data)
    groups, values = store.groups("a"), store.group_values("a")
    assert {"parameter", "row"} <= set(groups["kind"])
    for name in scope.parameters:
        by_loop = torch.stack([sample[name] for sample in expected])
        assert models.relative_error(store.gradients("a", name), by_loop, floor=1e-6) <= 1e-5
        rows = groups[(groups["kind"] == "row") & (groups["parameter"] == name)]
        if len(rows):
            found = torch.tensor(values["square"].values[:, rows.index])
            squares = by_loop.flatten(2).square().sum(2) if by_loop.dim() > 2 else by_loop.square()
            assert models.relative_error(found, squares) <= 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = fs.analyze(store)
    assert len(report["fisher"].frame) >= len(groups)


def test_an_adapter_given_by_hand() -> None:
    """A function, or the model type whose adapter fits; an unknown name says where the names are."""
    config = transformers.XGLMConfig(d_model=32, num_layers=2, attention_heads=4, ffn_dim=40, **TOKENS)
    model = transformers.AutoModelForCausalLM.from_config(config)

    def mine(model: torch.nn.Module, config: Any) -> Stack:
        return Stack("layers", Separate(output="out_proj"), None, 4, 4)

    scope = fs.wrap(model, adapter=mine)
    assert scope.layout.source == "registered"
    assert len(scope.layout.attention) == 2
    assert {r.module.rpartition(".")[2] for r in scope.layout.rows} == {"fc1", "fc2"}
    with pytest.raises(AdapterError, match=r"no module 'model\.layers\.0\.self_attn\.o_proj'"):
        fs.wrap(model, adapter="llama")
    with pytest.raises(AdapterError, match="no adapter is registered for 'lama'"):
        fs.wrap(model, adapter="lama")
    llama = models.build(models.named("llama"))
    assert fs.wrap(llama, adapter="mistral").layout == fs.wrap(llama).layout


def test_detection_leaves_the_model_as_it_was() -> None:
    """Weights, modes, hooks and gradients are untouched."""
    auto, config, _ = UNREGISTERED["bart"]
    model = getattr(transformers, auto).from_config(config())
    model.train()
    model.get_encoder().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    resolve(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_does_not_run_on_a_small_input() -> None:
    """The reason is in the warning, and modules and rows are there."""
    auto, config, _ = UNREGISTERED["biogpt"]
    model = getattr(transformers, auto).from_config(config())

    def fails(*_args: Any, **_kwargs: Any) -> None:
        raise ZeroDivisionError("no such thing")

    model.forward = fails
    with pytest.warns(UserWarning, match=r"does not run on a small random input: ZeroDivisionError: no such"):
        layout = resolve(model)
    assert layout.source == "modules"
    assert len(layout.rows) == 12


def test_a_linear_layer_that_computes_something_else_is_no_projection(tmp_path: Path) -> None:
    """A subclass of nn.Linear whose output is not its matrix's has no heads; its gradients are exact."""

    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = models.build(models.named("llama"))
    old = model.model.layers[0].self_attn.q_proj
    new = Doubled(old.in_features, old.out_features, bias=False)
    model.model.layers[0].self_attn.q_proj = new
    with pytest.raises(AdapterError, match=r"q_proj is not the linear map of its weight"):
        fs.wrap(model)
    scope = fs.wrap(model, verify=False, parameters=["*.q_proj.weight"])
    data = models.rows(3)
    store = scope.collect({"a": data}, tmp_path / "run.fs", extensions=EXACT, quiet=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = torch.stack([sample[name] for sample in models.loop(model, data)])
    assert models.relative_error(store.gradients("a", name), expected) <= 1e-5
