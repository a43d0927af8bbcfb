"""Layouts of the supported families, verified on live models; wrong ones are caught."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
import transformers

import fisherscope as fs
from fisherscope.adapters import known_model_types, registry, resolve
from fisherscope.adapters.build import Family
from fisherscope.adapters.patterns import Mlp, Separate
from fisherscope.adapters.probe import verify_layout
from fisherscope.errors import AdapterError
from fisherscope.layout import AttentionLayout, HeadBlock, ModelLayout
from tests import models


@pytest.fixture(params=models.SETTINGS, ids=lambda s: s.name)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return models.build(request.param)


def _with_blocks(layout: ModelLayout, **changed: HeadBlock) -> ModelLayout:
    attention = layout.attention[0]
    blocks = tuple(changed.get(b.name, b) for b in attention.blocks)
    return replace(layout, attention=(replace(attention, blocks=blocks), *layout.attention[1:]))


def test_the_probe_confirms_every_layer(model: torch.nn.Module) -> None:
    """Every head of Q, K, V and O of every attention layer moves the heads it should."""
    layout = resolve(model, probe="all")
    assert len(layout.attention) == 2
    verify_layout(model, layout, every_layer=True)


def test_every_parameter_has_a_place(model: torch.nn.Module) -> None:
    """The layout lists every parameter with its shape, and knows the kind of those in the layers."""
    layout = resolve(model)
    assert [p.name for p in layout.parameters] == [name for name, _ in model.named_parameters()]
    for info, (_, parameter) in zip(layout.parameters, model.named_parameters(), strict=True):
        assert info.shape == tuple(parameter.shape)
        if info.layer >= 0:
            assert info.kind in {"attention", "mlp", "norm"}


def test_the_layout_survives_json(model: torch.nn.Module) -> None:
    """What the store keeps is the layout itself."""
    layout = resolve(model)
    assert ModelLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_keys_and_values_swapped_are_caught(model: torch.nn.Module) -> None:
    """A layout that calls keys values is refused."""
    layout = resolve(model)
    key, value = (layout.attention[0].block(name) for name in "KV")
    wrong = _with_blocks(
        layout, K=HeadBlock("K", value.weight, value.bias), V=HeadBlock("V", key.weight, key.bias)
    )
    with pytest.raises(AdapterError, match=r"called [KV] head 0"):
        verify_layout(model, wrong)


def test_query_and_value_swapped_are_caught() -> None:
    """In a model without grouped heads Q and V have one shape; the probe still tells them apart."""
    model = models.build(models.SETTINGS[-1])
    layout = resolve(model)
    query, value = (layout.attention[0].block(name) for name in "QV")
    wrong = _with_blocks(
        layout, Q=HeadBlock("Q", value.weight, value.bias), V=HeadBlock("V", query.weight, query.bias)
    )
    with pytest.raises(AdapterError, match=r"called Q head 0 acts on other positions|moved heads"):
        verify_layout(model, wrong)


@pytest.mark.parametrize("block", ["Q", "V", "O"])
def test_heads_shifted_by_one_are_caught(model: torch.nn.Module, block: str) -> None:
    """A layout whose head numbers are off by one is refused, and the message says which head moved."""
    layout = resolve(model)
    if layout.attention[0].block(block).heads == 1:
        block = "Q"  # a single kv head cannot be shifted
    right = layout.attention[0].block(block)
    starts = right.weight.starts[1:] + right.weight.starts[:1]
    bias = None if right.bias is None else replace(right.bias, starts=starts)
    wrong = _with_blocks(layout, **{block: HeadBlock(block, replace(right.weight, starts=starts), bias)})
    with pytest.raises(AdapterError, match="moved heads"):
        verify_layout(model, wrong)


def test_a_bias_cut_differently_is_caught() -> None:
    """Weight and bias of a block must be cut alike."""
    model = models.build(models.SETTINGS[3])
    layout = resolve(model)
    right = layout.attention[0].block("Q")
    assert right.bias is not None
    wrong = _with_blocks(
        layout, Q=HeadBlock("Q", right.weight, replace(right.bias, starts=right.bias.starts[::-1]))
    )
    with pytest.raises(AdapterError, match="bias of Q"):
        verify_layout(model, wrong)


def test_the_probe_leaves_the_model_as_it_was() -> None:
    """Weights, modes, hooks and gradients are untouched, also when the probe fails."""
    model = models.build(models.SETTINGS[3])
    model.train()
    model.model.layers[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    layout = resolve(model, probe="all")
    key, value = (layout.attention[0].block(name) for name in "KV")
    wrong = _with_blocks(layout, K=replace(value, name="K"), V=replace(key, name="V"))
    with pytest.raises(AdapterError):
        verify_layout(model, wrong)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_probe_works_in_half_precision(dtype: torch.dtype) -> None:
    """Rounding of a half-precision model is not taken for movement."""
    for setting in models.SETTINGS:
        resolve(models.build(setting).to(dtype), probe="all")


def test_an_unknown_model_type_is_a_clear_error() -> None:
    """The message names the type and the next step."""
    config = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=20)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(AdapterError, match=r"no adapter for model_type 'bloom'.*register.*docs/adapters.md"):
        fs.wrap(model)


def test_something_that_is_no_transformers_model() -> None:
    """A plain module is refused with a hint."""
    with pytest.raises(AdapterError, match="AutoModelForCausalLM"):
        fs.wrap(torch.nn.Linear(2, 2))


def test_a_users_adapter_is_used_and_may_replace_a_built_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A registration of one's own works for a new type, and overrides a known one with a notice."""
    assert {"gpt2", "llama", "mistral", "qwen2", "qwen3"} <= set(known_model_types())
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    config = transformers.OPTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=24,
        vocab_size=30,
        word_embed_proj_dim=16,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)

    def opt(model: torch.nn.Module, config: transformers.OPTConfig) -> Family:
        heads = config.num_attention_heads
        return Family(
            layers="decoder.layers",
            attention=Separate(output="out_proj"),
            mlp=None,
            n_heads=heads,
            n_kv_heads=heads,
        )

    fs.register_adapter(opt, "opt")
    layout = resolve(model, probe="all")
    assert isinstance(layout.attention[0], AttentionLayout)
    with caplog.at_level(logging.WARNING):
        fs.register_adapter(opt, "llama")
    assert "'llama' is replaced" in caplog.text


def test_an_adapter_that_names_a_missing_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the path that does not exist."""
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    fs.register_adapter(
        lambda model, config: Family("layers", Separate(), Mlp("ffn", ("up",), "down"), 4, 2), "llama"
    )
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.ffn\.up"):
        resolve(models.build(models.SETTINGS[0]))
