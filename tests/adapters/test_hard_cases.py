"""Models that share weights, lack what a check needs, or have another adapter than theirs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fisherscope as fs
from fisherscope.adapters import resolve
from fisherscope.adapters.build import Stack, build_layout
from fisherscope.adapters.families.llama import decoder
from fisherscope.adapters.inputs import probe_inputs
from fisherscope.adapters.patterns import Concat, Mlp, Separate
from fisherscope.adapters.probe import verify_layout
from fisherscope.errors import AdapterError
from fisherscope.layout import ModelLayout, SharedModule
from fisherscope.layout.codec import check_partitions
from tests import models

EXACT = (fs.Fisher(), fs.SampleGradients(parameters="all", dtype="float32"))
LLAMA_MLP = Mlp("mlp", ("gate_proj", "up_proj"), "down_proj")


def _config(name: str, **changes: object) -> transformers.PretrainedConfig:
    config = models.named(name).config()
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def _tied_projection() -> Any:
    model: Any = models.build(models.named("llama"))
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    return model


def _first_layer_only(_model: torch.nn.Module, _config: Any) -> Stack:
    return Stack("layers", [Separate(), None], LLAMA_MLP, 4, 2)


def test_a_weight_tied_between_layers_is_no_two_heads(tmp_path: Path) -> None:
    """Both names are in the error; described once, the weight's gradients and head squares are exact."""
    model = _tied_projection()
    with pytest.raises(
        AdapterError, match=r"layers\.1\.self_attn\.q_proj\.weight shares one weight with model\.layers\.0"
    ):
        fs.wrap(model)
    scope = fs.wrap(model, adapter=_first_layer_only)
    assert ModelLayout.from_json(scope.layout.to_json()) == scope.layout
    assert {(r.layer, r.module.rpartition(".")[2]) for r in scope.layout.rows} == {
        (1, name) for name in ("k_proj", "v_proj", "o_proj")
    }
    data = models.rows(3)
    scope.collect({"a": data}, tmp_path / "run.fs", extensions=EXACT, quiet=True)
    store = fs.open_store(tmp_path / "run.fs")
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = torch.stack([sample[name] for sample in models.loop(model, data)])
    assert models.relative_error(store.gradients("a", name), expected) <= 1e-5
    groups = store.groups("a")
    heads = groups[(groups["kind"] == "head") & (groups["parameter"] == name)]
    assert list(heads["index"]) == [0, 1, 2, 3]
    squares = expected.unflatten(1, (4, -1)).square().sum((2, 3))
    found = torch.tensor(store.group_values("a")["square"].values[:, heads.index])
    assert models.relative_error(found, squares) <= 1e-5


def test_a_weight_tied_within_a_layer_is_no_two_blocks() -> None:
    """Queries and keys of one weight are refused, with both names; so are MLPs of one weight."""
    model: Any = models.build(
        replace(models.named("llama"), config=lambda: _config("llama", num_key_value_heads=4))
    )
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight = attention.q_proj.weight
    with pytest.raises(AdapterError, match=r"k_proj\.weight shares one weight with .*q_proj\.weight.*heads"):
        resolve(model)
    model = models.build(models.named("llama"))
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj\.weight shares .*channels of layer 1"):
        resolve(model)


def test_a_block_with_all_weights_tied_is_listed_once() -> None:
    """As with ALBERT's one layer: the heads and channels of the first place, and no entry twice."""
    model: Any = models.build(models.named("gpt2"))
    first, second = model.transformer.h
    for name, module in first.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            setattr(second.get_submodule(name), key, parameter)
    layout = resolve(model, verify="all")
    assert [a.layer for a in layout.attention] == [0]
    assert [m.layer for m in layout.mlps] == [0]
    assert not layout.rows
    assert ModelLayout.from_json(layout.to_json()) == layout
    second.attn.c_proj.bias = torch.nn.Parameter(torch.zeros(32))
    assert [a.layer for a in resolve(model).attention] == [0]
    second.attn.c_attn.bias = torch.nn.Parameter(torch.zeros(96))
    with pytest.raises(
        AdapterError, match=r"h\.1\.attn\.c_attn\.weight shares one weight with transformer\.h\.0"
    ):
        resolve(model)


def test_a_shared_attention_module_is_named() -> None:
    """Both places are in the error, and the way out that it names works."""
    model: Any = models.build(models.named("llama"))
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    with pytest.raises(
        AdapterError, match=r"layers\.1\.self_attn is shared with model\.layers\.0\.self_attn.*adapter="
    ):
        resolve(model)
    layout = resolve(model, adapter=_first_layer_only, verify="all")
    assert [a.layer for a in layout.attention] == [0]
    assert len(layout.mlps) == 2


@pytest.mark.parametrize("repeats", [1, 3])
def test_layers_that_are_called_several_times_are_listed_once(repeats: int) -> None:
    """ALBERT calls one layer for all; its heads are those of that layer."""
    config = transformers.AlbertConfig(
        hidden_size=32,
        embedding_size=16,
        num_hidden_layers=repeats,
        num_attention_heads=4,
        intermediate_size=40,
        vocab_size=models.VOCABULARY,
    )
    layout = resolve(transformers.AlbertModel(config).eval(), strict=True, verify="all")
    assert [(a.stack, a.layer, a.n_heads) for a in layout.attention] == [("encoder", 0, 4)]
    shared = [SharedModule("encoder.albert_layer_groups.0", repeats)] if repeats > 1 else []
    assert list(layout.shared) == shared
    assert layout.runs(layout.attention[0].block("Q").weight.parameter) == repeats


def test_models_whose_modules_run_once_share_nothing() -> None:
    """Neither heads nor experts nor tied embeddings count as repeated; a layer that two places hold does."""
    for name in ("gpt2", "llama", "mixtral", "t5", "vit"):
        assert resolve(models.build(models.named(name))).shared == ()
    model: Any = models.build(models.named("llama"))
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    layout = resolve(model, adapter=_first_layer_only)
    assert layout.shared == (SharedModule("model.layers.0.self_attn", 2),)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("setting", models.ALL, ids=lambda s: s.name)
def test_partitions_are_of_parameters_that_are_there(setting: models.Setting) -> None:
    """What any adapter builds can be written and read back."""
    layout = resolve(models.build(setting), verify=False)
    assert ModelLayout.from_json(layout.to_json()) == layout
    wrong = replace(layout, parameters=layout.parameters[:1])
    with pytest.raises(ValueError, match="not a model layout: a partition of"):
        check_partitions(wrong)


def test_two_attentions_of_one_number_need_two_stacks() -> None:
    """One stack described twice under one name is an error that says what to change."""
    model = models.build(models.named("llama"))
    stack = Stack("layers", Separate(), None, 4, 2)
    with pytest.raises(AdapterError, match="are both layer 0 of the stack 'decoder': give one of their"):
        build_layout(model, "llama", [stack, stack])
    layout = resolve(model)
    with pytest.raises(ValueError, match="are both layer 0 of the stack 'decoder'"):
        replace(layout, attention=layout.attention * 2)


def _vit_to_gpt2() -> torch.nn.Module:
    parts = models.named("vit").config(), models.named("gpt2").config()
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    return transformers.VisionEncoderDecoderModel(config=config)


def _segformer() -> torch.nn.Module:
    pairs = {
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [16, 16],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
    }
    return transformers.SegformerModel(transformers.SegformerConfig(num_encoder_blocks=2, **pairs))


def _clip() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    text = {**sizes, "vocab_size": models.VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}
    )
    return transformers.CLIPModel(config)


@pytest.mark.parametrize(
    ("build", "missing"),
    [
        (_vit_to_gpt2, "its config has no image_size"),
        (_segformer, "its config has no image_size"),
        (_clip, "CLIPModel names no table of token embeddings"),
    ],
)
def test_a_model_without_a_small_input_has_modules_and_rows(
    build: Callable[[], torch.nn.Module], missing: str
) -> None:
    """The error names what is missing; wrapping gives one warning with that reason, checked or not."""
    model = build()
    with pytest.raises(AdapterError, match=missing):
        probe_inputs(model, 1, 0)
    for verify in ("first", False):
        with pytest.warns(UserWarning, match=missing) as caught:
            scope = fs.wrap(model, verify=verify)
        assert sum("fisherscope" in str(w.message) for w in caught) == 1
        assert scope.layout.source == "modules"
        assert scope.layout.rows


@pytest.mark.parametrize("name", ["t5", "falcon", "bert", "mpt", "gpt_oss", "vit", "gpt2", "codegen"])
def test_the_adapter_of_another_architecture_is_refused(name: str) -> None:
    """Whatever it stumbles over, the error is an AdapterError that tells what was not there."""
    model = models.build(models.named("llama"))
    with pytest.raises(AdapterError, match=r"has no|the model has None|no module"):
        fs.wrap(model, adapter=name)


def test_an_adapter_that_fails_is_named() -> None:
    """The function's name, the cause and its traceback; contradictory patterns likewise."""
    model = models.build(models.named("llama"))

    def mine(_model: torch.nn.Module, config: Any) -> Stack:
        return Stack("layers", Separate(), None, config.heads, 2)

    with pytest.raises(
        AdapterError, match=r"mine does not describe this LlamaForCausalLM .*'heads'"
    ) as caught:
        resolve(model, adapter=mine)
    assert isinstance(caught.value.__cause__, AttributeError)

    def stacked_once(_model: torch.nn.Module, config: Any) -> Stack:
        concat = Concat("self_attn", fused="qkv_proj", output="o_proj")
        return decoder(config, concat, Mlp("mlp", ("gate_up_proj",), "down_proj", stacked=1))

    with pytest.raises(AdapterError, match=r"'phi3' contradicts itself: .*disagree on the number of pieces"):
        resolve(models.build(models.named("phi3")), adapter=stacked_once)


def test_a_decoder_with_cross_attention_is_checked_without_its_encoder() -> None:
    """BERT's and GPT-2's cross attention is confirmed on random hidden states of an encoder."""
    bert = _config("bert", is_decoder=True, add_cross_attention=True)
    for config in (bert, _config("gpt2", add_cross_attention=True)):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        layout = resolve(model, verify="all", strict=True)
        assert layout.source == "registered"
        assert [(a.stack, a.layer) for a in layout.attention] == [
            *[("decoder", 0), ("decoder", 1)],
            *[("cross", 0), ("cross", 1)],
        ]
        assert not layout.rows
        low = resolve(model.bfloat16(), verify="all", strict=True)
        assert low == layout


def test_keys_and_values_of_cross_attention_are_told_apart() -> None:
    """GPT-2's joined projection is keys, then values: the other order is refused."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(_config("gpt2", add_cross_attention=True)).eval()
    layout = resolve(model)
    cross = layout.attention_layer(0, "cross")
    assert cross.block("K").weight.starts[0] == 0
    assert cross.block("V").weight.starts[0] == 32
    exchanged = {"K": "V", "V": "K"}
    blocks = [replace(b, name=exchanged.get(b.name, b.name)) for b in cross.blocks]
    wrong = replace(layout, attention=(replace(cross, blocks=tuple(blocks)),))
    with pytest.raises(AdapterError, match=r"is wrong at transformer\.h\.0\.crossattention"):
        verify_layout(model, wrong)


def _encoder_decoder(decoder_config: transformers.PretrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(_config("bert"), decoder_config)
    return transformers.EncoderDecoderModel(config=config).eval()


def test_an_encoder_decoder_is_more_than_its_decoder() -> None:
    """Encoder, decoder and cross attention of BERT to BERT; GPT-2's adapter is not asked about BERT."""
    layout = resolve(_encoder_decoder(_config("bert")), strict=True, verify="all")
    assert layout.source == "detected"
    assert [(a.stack, a.layer) for a in layout.attention] == [
        (stack, layer) for stack in ("encoder", "decoder", "cross") for layer in range(2)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layout = resolve(_encoder_decoder(models.named("gpt2").config()))
    assert layout.source == "detected"
    assert {("encoder", 0), ("encoder", 1), ("decoder", 0)} <= {(a.stack, a.layer) for a in layout.attention}


def test_an_adapter_that_finds_nothing_says_so() -> None:
    """Optional patterns that match no layer: a warning with the adapter's name, an error if strict."""
    model = models.build(models.named("llama"))

    def misspelt(_model: torch.nn.Module, _config: Any) -> Stack:
        return Stack("layers", Separate(query="query_proj", optional=True), LLAMA_MLP, 4, 2)

    with pytest.warns(
        UserWarning, match=r"misspelt, the adapter for model_type 'llama', found attention in no"
    ):
        layout = resolve(model, adapter=misspelt)
    assert not layout.attention
    assert len(layout.mlps) == 2
    with pytest.raises(AdapterError, match="found attention in no layer"):
        resolve(model, adapter=misspelt, strict=True)
