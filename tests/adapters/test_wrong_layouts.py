"""Layouts that are wrong in ways a model's outputs alone do not show, and models that are hard to probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from fisherscope.adapters import resolve
from fisherscope.adapters.probe import verify_layout
from fisherscope.errors import AdapterError
from fisherscope.layout import AttentionLayout, HeadBlock, MlpLayout, ModelLayout, Partition
from tests import models

Wrong = Callable[[AttentionLayout], AttentionLayout]


def _with(attention: AttentionLayout, **changed: HeadBlock) -> AttentionLayout:
    return replace(attention, blocks=tuple(changed.get(b.name, b) for b in attention.blocks))


def _recut(block: HeadBlock, **cut: Any) -> HeadBlock:
    bias = None if block.bias is None else replace(block.bias, **cut)
    return HeadBlock(block.name, replace(block.weight, **cut), bias)


def _half_width(name: str) -> Wrong:
    return lambda a: _with(a, **{name: _recut(a.block(name), width=a.block(name).weight.width // 2)})


def _other_axis(name: str) -> Wrong:
    def wrong(a: AttentionLayout) -> AttentionLayout:
        weight = a.block(name).weight
        return _with(a, **{name: HeadBlock(name, replace(weight, axis=1 - weight.axis), a.block(name).bias)})

    return wrong


def _biases_swapped(a: AttentionLayout) -> AttentionLayout:
    key, value = a.block("K"), a.block("V")
    return _with(a, K=HeadBlock("K", key.weight, value.bias), V=HeadBlock("V", value.weight, key.bias))


def _no_bias(a: AttentionLayout) -> AttentionLayout:
    return _with(a, Q=HeadBlock("Q", a.block("Q").weight))


def _output_of_query(a: AttentionLayout) -> AttentionLayout:
    return _with(a, O=HeadBlock("O", replace(a.block("O").weight, parameter=a.block("Q").weight.parameter)))


def _half_of_the_heads(a: AttentionLayout) -> AttentionLayout:
    blocks = tuple(_recut(b, starts=b.weight.starts[: b.heads // 2]) for b in a.blocks)
    return replace(a, n_heads=a.n_heads // 2, n_kv_heads=a.n_kv_heads // 2, blocks=blocks)


@pytest.mark.parametrize("name", ["opt", "qwen2", "gpt2", "bert"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (_half_width("Q"), "overlap or leave entries out"),
        (_half_width("K"), "overlap or leave entries out"),
        (_half_width("O"), "overlap or leave entries out"),
        (_biases_swapped, "the bias of K is"),
        (_no_bias, "the bias of Q is None"),
        (_output_of_query, "is cut along axis|O is cut from|of shape"),
        (_half_of_the_heads, "overlap or leave entries out"),
    ],
    ids=["half Q", "half K", "half O", "biases swapped", "no bias", "O of Q's weight", "half the heads"],
)
def test_slices_in_the_wrong_place_are_caught(name: str, wrong: Wrong, message: str) -> None:
    """What moves is right, but the slices are not where the model keeps the weights."""
    model = models.build(models.named(name))
    layout = resolve(model)
    with pytest.raises(AdapterError, match=message):
        verify_layout(model, replace(layout, attention=(wrong(layout.attention[0]), *layout.attention[1:])))


@pytest.mark.parametrize("name", ["opt", "llama", "bert"])
@pytest.mark.parametrize("block", ["Q", "O"])
def test_square_weights_cut_along_the_wrong_axis_are_caught(name: str, block: str) -> None:
    """Shapes do not tell inputs from outputs there."""
    model = models.build(models.named(name))
    layout = resolve(model)
    wrong = _other_axis(block)(layout.attention[0])
    with pytest.raises(AdapterError, match=r"is cut along axis \d of"):
        verify_layout(model, replace(layout, attention=(wrong, *layout.attention[1:])))


def test_another_layers_output_is_caught() -> None:
    """O belongs to the projection that the contexts go into."""
    model = models.build(models.named("llama"))
    layout = resolve(model)
    wrong = _with(layout.attention[0], O=layout.attention[1].block("O"))
    with pytest.raises(AdapterError, match=r"O is cut from model\.layers\.1"):
        verify_layout(model, replace(layout, attention=(wrong, *layout.attention[1:])))


def _swapped(partition: Partition) -> Partition:
    first, second, third, *rest = partition.starts
    return replace(partition, starts=(first, third, second, *rest))


def _channels(mlp: MlpLayout, what: str) -> MlpLayout:
    if what == "biases":
        return replace(mlp, biases=tuple(map(_swapped, mlp.biases)))
    if what == "contract":
        return replace(mlp, weights=(*mlp.weights[:-1], _swapped(mlp.weights[-1])))
    return replace(mlp, weights=(_swapped(mlp.weights[0]), *mlp.weights[1:]))


@pytest.mark.parametrize("name", ["llama-biases", "gpt2", "opt", "phi3", "nemotron"])
@pytest.mark.parametrize("what", ["expand", "contract", "biases"])
def test_two_channels_exchanged_are_caught(name: str, what: str) -> None:
    """Every channel is checked, not some: two neighbours exchanged on one side are found."""
    model = models.build(models.named(name))
    layout = resolve(model)
    if what == "biases" and not layout.mlps[0].biases:
        assert name in {"phi3", "nemotron"}
        return
    wrong = _channels(layout.mlps[0], what)
    with pytest.raises(AdapterError, match=r"moves? with|biases of the channels"):
        verify_layout(model, replace(layout, mlps=(wrong, *layout.mlps[1:])))


def test_a_projection_named_twice_is_caught() -> None:
    """Its squares would be counted twice."""
    model = models.build(models.named("llama"))
    layout = resolve(model)
    gate, up, down = layout.mlps[0].weights
    assert gate != up
    wrong = replace(layout.mlps[0], weights=(up, up, down))
    with pytest.raises(AdapterError, match="overlap or leave entries out"):
        verify_layout(model, replace(layout, mlps=(wrong, *layout.mlps[1:])))


def _t5(heads: int) -> torch.nn.Module:
    config = transformers.T5Config(
        d_model=64, d_kv=64, num_layers=1, num_heads=heads, d_ff=32, vocab_size=61, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def _olmo2(heads: int, width: int) -> torch.nn.Module:
    config = transformers.Olmo2Config(
        hidden_size=heads * width,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=32,
        vocab_size=61,
        pad_token_id=0,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def _chunks() -> torch.nn.Module:
    config = models.named("llama4").config()
    config.attention_chunk_size = 4
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [lambda: _t5(8), lambda: _olmo2(16, 64), _chunks],
    ids=["unscaled scores", "many coupled heads", "short chunks"],
)
def test_models_that_are_hard_to_probe(make: Callable[[], torch.nn.Module], dtype: torch.dtype) -> None:
    """A saturated softmax, a norm over a thousand entries, a last position that sees little."""
    torch.manual_seed(0)
    layout = resolve(make().to(dtype))
    assert layout.attention


@pytest.mark.parametrize("sink", [-15.0, 25.0])
def test_sinks_that_take_nothing_or_everything(sink: float) -> None:
    """Trained sinks may hide what their heads do; the probe does without them, and puts them back."""
    model: Any = models.build(models.named("gpt_oss"))
    with torch.no_grad():
        model.model.layers[0].self_attn.sinks[1] = sink
    before = model.model.layers[0].self_attn.sinks
    layout: ModelLayout = resolve(model, verify="all")
    assert layout.attention[0].has("sink")
    assert model.model.layers[0].self_attn.sinks is before
    assert float(before[1].detach()) == sink
