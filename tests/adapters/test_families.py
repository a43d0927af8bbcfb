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
from fisherscope.adapters.build import Stack, build_layout
from fisherscope.adapters.inputs import probe_inputs
from fisherscope.adapters.patterns import Concat, Fused, Grouped, JoinedKeyValue, Latent, Mlp, Separate
from fisherscope.adapters.probe import verify_layout
from fisherscope.errors import AdapterError
from fisherscope.layout import AttentionLayout, HeadBlock, ModelLayout
from tests import models


@pytest.fixture(params=models.ALL, ids=lambda s: s.name)
def setting(request: pytest.FixtureRequest) -> models.Setting:
    return request.param


@pytest.fixture
def model(setting: models.Setting) -> torch.nn.Module:
    return models.build(setting)


def _nested(projections: dict[str, torch.nn.Module]) -> torch.nn.Module:
    """A layer "l" with an attention module "a" of these projections."""
    return torch.nn.ModuleDict({"l": torch.nn.ModuleDict({"a": torch.nn.ModuleDict(projections)})})


def _with_blocks(layout: ModelLayout, **changed: HeadBlock) -> ModelLayout:
    attention = layout.attention[0]
    blocks = tuple(changed.get(b.name, b) for b in attention.blocks)
    return replace(layout, attention=(replace(attention, blocks=blocks), *layout.attention[1:]))


def test_the_probe_confirms_every_layer(setting: models.Setting, model: torch.nn.Module) -> None:
    """Every head of Q, K, V and O of every attention layer moves the heads it should."""
    layout = resolve(model, verify="all")
    assert layout.source == "registered"
    assert len(layout.attention) == setting.attention_layers
    assert all({"Q", "K", "V", "O"} <= {b.name for b in a.blocks} for a in layout.attention)


def test_every_parameter_has_a_place(model: torch.nn.Module) -> None:
    """The layout lists every parameter with its shape, and knows the kind of those in the layers."""
    layout = resolve(model)
    assert [p.name for p in layout.parameters] == [name for name, _ in model.named_parameters()]
    for info, (_, parameter) in zip(layout.parameters, model.named_parameters(), strict=True):
        assert info.shape == tuple(parameter.shape)
        if info.layer >= 0 and "linear_attn" not in info.name:
            assert info.kind != "other", info.name
        if info.layer < 0 and "classifier" not in info.name:
            assert info.kind in {"embedding", "norm", "output"}, info.name


def test_flags_tell_whose_a_parameter_is(model: torch.nn.Module) -> None:
    """Every parameter of an attention module is a head's, a group's or shared; others have no flag."""
    layout = resolve(model)
    for info in layout.parameters:
        inside = any(info.name.startswith(f"{a.module}.") for a in layout.attention)
        assert bool(layout.flags(info.name)) == inside, info.name
    for attention in layout.attention:
        assert layout.flags(f"{attention.output}.weight") == {"per_head"}
        grouped = attention.n_kv_heads < attention.n_heads
        assert ("per_group" in attention.flags("K")) == grouped
        assert ("coupled" in attention.flags("Q")) == ("Q" in attention.coupled)


def test_heads_contexts_add_up_to_the_output(model: torch.nn.Module) -> None:
    """O's input split by head, each part times the head's slice of O, sums to O's output without its bias."""
    layout = resolve(model)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = [
        model.get_submodule(a.output).register_forward_hook(
            lambda _m, args, out, path=a.output: seen.update({path: (args[0], out)})
        )
        for a in layout.attention
    ]
    with torch.no_grad():
        model(**probe_inputs(model, rows=3, seed=5))
    for handle in handles:
        handle.remove()
    weights = dict(model.named_parameters())
    for attention in layout.attention:
        context, output = seen[attention.output]
        total = torch.zeros_like(output)
        block = attention.block("O").weight
        for head, cut in enumerate(block):
            mine = context[..., block.starts[head] : block.starts[head] + block.width]
            weight = cut.take(weights[block.parameter].detach())
            total += mine @ (weight if block.axis == 0 else weight.T)
        bias = weights.get(f"{attention.output}.bias")
        assert models.relative_error(total if bias is None else total + bias.detach(), output) <= 1e-5


def test_the_layout_survives_json(model: torch.nn.Module) -> None:
    """What the store keeps is the layout itself."""
    layout = resolve(model)
    assert ModelLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_keys_and_values_swapped_are_caught(model: torch.nn.Module) -> None:
    """A layout that calls keys values is refused, in causal models and in others."""
    layout = resolve(model)
    key, value = (layout.attention[0].block(name) for name in "KV")
    wrong = _with_blocks(
        layout, K=HeadBlock("K", value.weight, value.bias), V=HeadBlock("V", key.weight, key.bias)
    )
    with pytest.raises(AdapterError, match=r"called [QK] head 0 acts as a value does"):
        verify_layout(model, wrong)


def test_query_and_value_swapped_are_caught() -> None:
    """In a model without grouped heads Q and V have one shape; the probe still tells them apart."""
    model = models.build(models.named("gpt2"))
    layout = resolve(model)
    query, value = (layout.attention[0].block(name) for name in "QV")
    wrong = _with_blocks(
        layout, Q=HeadBlock("Q", value.weight, value.bias), V=HeadBlock("V", query.weight, query.bias)
    )
    with pytest.raises(AdapterError, match=r"called Q head 0 acts as a value does"):
        verify_layout(model, wrong)


def test_query_and_key_swapped_are_caught() -> None:
    """So are the two that both act through the scores, in a causal model and in an encoder."""
    for name in ("gpt2", "bert"):
        model = models.build(models.named(name))
        layout = resolve(model)
        query, key = (layout.attention[0].block(block) for block in "QK")
        wrong = _with_blocks(
            layout, Q=HeadBlock("Q", key.weight, key.bias), K=HeadBlock("K", query.weight, query.bias)
        )
        with pytest.raises(AdapterError, match=r"called Q head 0 acts on other positions|moved heads \[\]"):
            verify_layout(model, wrong)


def test_query_and_gate_swapped_are_caught() -> None:
    """Both are rows of one projection; with the keys silent only a gate acts."""
    model = models.build(models.named("qwen3_next"))
    layout = resolve(model)
    query, gate = (layout.attention[0].block(block) for block in ("Q", "gate"))
    wrong = _with_blocks(layout, Q=HeadBlock("Q", gate.weight), gate=HeadBlock("gate", query.weight))
    with pytest.raises(AdapterError, match=r"called Q head 0 acts as a gate does"):
        verify_layout(model, wrong)


def test_a_sink_of_another_head_is_caught() -> None:
    """The logits that take attention away are one per head, in order; the probe puts them back."""
    model = models.build(models.named("gpt_oss"))
    layout = resolve(model)
    right = layout.attention[0].block("sink").weight
    before = model.get_parameter(right.parameter).clone()
    wrong = _with_blocks(layout, sink=HeadBlock("sink", replace(right, starts=right.starts[::-1])))
    with pytest.raises(AdapterError, match=r"perturbing sink 0 moved heads \[3\]"):
        verify_layout(model, wrong)
    assert torch.equal(before, model.get_parameter(right.parameter))


@pytest.mark.parametrize(
    "name",
    ["llama", "mistral-head-dim", "qwen2-tied-mqa", "gpt2", "opt", "phi3", "olmo2", "bert", "vit", "t5"],
)
def test_two_heads_taken_for_one_are_caught(name: str) -> None:
    """With half as many heads, twice as wide, every perturbation moves "its" head; one entry does not."""
    model = models.build(models.named(name))
    layout = resolve(model)
    right = layout.attention[0]

    def paired(block: HeadBlock) -> HeadBlock:
        cut = {"starts": block.weight.starts[::2], "width": 2 * block.weight.width}
        bias = None if block.bias is None else replace(block.bias, **cut)
        return replace(block, weight=replace(block.weight, **cut), bias=bias)

    blocks = tuple(paired(b) if b.heads > 1 else b for b in right.blocks)
    kv_heads = max(1, right.n_kv_heads // 2)
    wrong = replace(right, n_heads=right.n_heads // 2, n_kv_heads=kv_heads, blocks=blocks)
    with pytest.raises(AdapterError, match=r"it is several heads|moved heads \[0\], not \[0, 1\]"):
        verify_layout(model, replace(layout, attention=(wrong, *layout.attention[1:])))


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
    model = models.build(models.named("qwen2"))
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
    model = models.build(models.named("qwen2"))
    model.train()
    model.model.layers[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    layout = resolve(model, verify="all")
    key, value = (layout.attention[0].block(name) for name in "KV")
    wrong = _with_blocks(layout, K=replace(value, name="K"), V=replace(key, name="V"))
    with pytest.raises(AdapterError):
        verify_layout(model, wrong)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "name",
    ["gpt_neox", "bloom", "falcon-mha-alibi", "falcon-new-decoder", "codegen"],
)
def test_a_fused_projection_cut_as_if_it_were_not_interleaved_is_caught(name: str) -> None:
    """[all Q | all K | all V] instead of the model's own order is refused."""
    model = models.build(models.named(name))
    layout = resolve(model)
    right = layout.attention[0]
    module, fused = right.block("Q").weight.parameter.removesuffix(".weight").rsplit(".", 1)
    concat = Concat(module.rsplit(".", 1)[1], fused, right.output.rsplit(".", 1)[1])
    path = module.rsplit(".", 1)[0]
    wrong = concat.layout(model.get_submodule, path, 0, right.n_heads, right.n_kv_heads)
    assert wrong.module == right.module
    with pytest.raises(AdapterError, match="is wrong at"):
        verify_layout(model, replace(layout, attention=(wrong, *layout.attention[1:])))


def test_values_before_keys_is_not_keys_before_values() -> None:
    """CodeGen's order with keys first, as one would guess, is refused."""
    model = models.build(models.named("codegen"))
    layout = resolve(model)
    pattern = Fused("attn", "qkv_proj", "out_proj", sections=4)
    wrong = pattern.layout(model.get_submodule, "transformer.h.0", 0, 8, 8)
    with pytest.raises(AdapterError, match=r"called [KV] head 0"):
        verify_layout(model, replace(layout, attention=(wrong, *layout.attention[1:])))


def test_with_one_kv_head_grouped_and_concat_are_the_same() -> None:
    """Falcon 7B may be described either way."""
    model = models.build(models.named("falcon-mqa"))
    concat = Concat("self_attention", "query_key_value", "dense")
    found = concat.layout(model.get_submodule, "transformer.h.0", 0, 4, 1)
    assert found == resolve(model).attention[0]


def test_fused_projections_are_cut_as_written_here() -> None:
    """First rows of Q, K and V heads of width 4, written by hand."""
    sizes = {"qkv": 32, "q": 16, "q2": 32, "kv": 16, "k": 8, "expand": 28}
    modules = _nested({"o": torch.nn.Linear(16, 4)} | {n: torch.nn.Linear(4, s) for n, s in sizes.items()})
    for pattern, expected in (
        (Concat("a", "qkv", "o"), {"Q": (0, 4, 8, 12), "K": (16, 20), "V": (24, 28)}),
        (Grouped("a", "qkv", "o"), {"Q": (0, 4, 16, 20), "K": (8, 24), "V": (12, 28)}),
        (
            Fused("a", "qkv", "o", sections=2, order=("Q", "V", "K")),
            {"Q": (0, 4, 16, 20), "K": (12, 28), "V": (8, 24)},
        ),
        (JoinedKeyValue("a", "q", "kv", "o"), {"Q": (0, 4, 8, 12), "K": (0, 4), "V": (8, 12)}),
        (JoinedKeyValue("a", "q", "kv", "o", grouped=True), {"K": (0, 8), "V": (4, 12)}),
        (
            Latent("a", "q_b", "q", "expand", "o"),
            {"Q": (0, 4, 8, 12), "K": (0, 7, 14, 21), "V": (3, 10, 17, 24)},
        ),
        (Separate("a", "q2", "k", "k", "o", gated=True), {"Q": (0, 8, 16, 24), "gate": (4, 12, 20, 28)}),
    ):
        layout = pattern.layout(modules.get_submodule, "l", 0, 4, 2)
        assert layout is not None
        for block, starts in expected.items():
            found = layout.block(block)
            assert found.weight.starts == starts
            assert found.bias is not None
            assert found.bias.starts == starts


def test_heads_that_cannot_be_divided_among_sections() -> None:
    """The error names the projection and the numbers."""
    modules = _nested({"qkv": torch.nn.Linear(4, 36), "o": torch.nn.Linear(12, 4)})
    pattern = Fused("a", "qkv", "o", sections=4)
    with pytest.raises(AdapterError, match=r"l\.a\.qkv: 6 heads cannot be divided among 4 sections"):
        pattern.layout(modules.get_submodule, "l", 0, 6, 6)


@pytest.mark.parametrize("name", ["olmo2", "olmo3", "olmoe"])
def test_a_norm_over_all_heads_must_be_declared(name: str) -> None:
    """The flag is in the layout; without it the probe sees all heads move."""
    model = models.build(models.named(name))
    layout = resolve(model)
    assert all(a.coupled == ("Q", "K") for a in layout.attention)
    for declared in ((), ("Q",), ("K",)):
        wrong = replace(layout.attention[0], coupled=declared)
        with pytest.raises(AdapterError, match=r"perturbing [QK] head 0 moved heads \[0, 1, 2, 3\]"):
            verify_layout(model, replace(layout, attention=(wrong, *layout.attention[1:])))


@pytest.mark.parametrize("name", ["llama", "qwen3-head-dim", "cohere", "stablelm"])
@pytest.mark.parametrize("block", ["Q", "K", "V"])
def test_a_coupling_that_is_not_there_is_refused(name: str, block: str) -> None:
    """Norms within a head tie nothing, and a layout that says otherwise is wrong."""
    model = models.build(models.named(name))
    layout = resolve(model)
    wrong = replace(layout.attention[0], coupled=(block,))
    with pytest.raises(AdapterError, match=rf"perturbing {block} head 0 moved heads .*not \[0, 1, 2, 3\]"):
        verify_layout(model, replace(layout, attention=(wrong, *layout.attention[1:])))


def test_an_unknown_block_cannot_be_coupled() -> None:
    """The flag names blocks of the layer."""
    layout = resolve(models.build(models.named("llama")))
    with pytest.raises(ValueError, match="no block 'X'"):
        replace(layout.attention[0], coupled=("X",))


def test_layers_may_differ() -> None:
    """One pattern per layer, None where there is nothing; another number of them is an error."""
    model = models.build(models.named("llama"))
    mlp = Mlp("mlp", ("up_proj",), "down_proj")
    layout = build_layout(model, "llama", Stack("layers", [None, Separate()], [mlp, None], 4, 2))
    assert [a.layer for a in layout.attention] == [1]
    assert [m.layer for m in layout.mlps] == [0]
    with pytest.raises(AdapterError, match="1 mlp patterns for 2 layers"):
        build_layout(model, "llama", Stack("layers", Separate(), [mlp], 4, 2))


def test_channels_of_a_stacked_projection() -> None:
    """Channel c of Phi-3 is row c of the gate, row c of the up projection below it, and column c."""
    model = models.build(models.named("phi3"))
    mlp = resolve(model).mlps[0]
    assert mlp.channels == 40
    rows = [(p.parameter.rsplit(".", 2)[1], p.axis, p.starts[7]) for p in mlp.weights]
    assert rows == [("gate_up_proj", 0, 7), ("gate_up_proj", 0, 47), ("down_proj", 1, 7)]


def test_the_text_model_inside_a_multimodal_one() -> None:
    """Layers are found below ``language_model`` and confirmed there."""
    config = transformers.Gemma3Config(
        text_config=models.named("gemma3-text").config().to_dict(),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=58,
        eoi_token_index=59,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config)
    layout = resolve(model, verify="all")
    assert layout.model_type == "gemma3"
    assert layout.attention[1].module == "model.language_model.layers.1.self_attn"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_probe_works_in_half_precision(dtype: torch.dtype) -> None:
    """Rounding of a half-precision model is not taken for movement."""
    for setting in models.SETTINGS:
        resolve(models.build(setting).to(dtype), verify="all")


def test_something_that_is_no_transformers_model() -> None:
    """A plain module is refused with a hint."""
    with pytest.raises(AdapterError, match="AutoModelForCausalLM"):
        fs.wrap(torch.nn.Linear(2, 2))


def test_a_users_adapter_is_used_and_may_replace_a_built_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A registration of one's own works for a new type, and overrides a known one with a notice."""
    assert {"gpt2", "llama", "mistral", "qwen2", "qwen3"} <= set(known_model_types())
    monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))
    config = transformers.XGLMConfig(
        d_model=16, num_layers=1, attention_heads=2, ffn_dim=24, vocab_size=30, max_position_embeddings=16
    )
    model = transformers.AutoModelForCausalLM.from_config(config)

    def xglm(model: torch.nn.Module, config: transformers.XGLMConfig) -> Stack:
        heads = config.attention_heads
        return Stack("layers", Separate(output="out_proj"), Mlp("", ("fc1",), "fc2"), heads, heads)

    fs.register_adapter(xglm, "xglm")
    layout = resolve(model, verify="all")
    assert isinstance(layout.attention[0], AttentionLayout)
    with caplog.at_level(logging.WARNING):
        fs.register_adapter(xglm, "llama")
    assert "'llama' is replaced" in caplog.text


def test_an_adapter_that_names_a_missing_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the path that does not exist."""
    monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))
    fs.register_adapter(
        lambda model, config: Stack("layers", Separate(), Mlp("ffn", ("up",), "down"), 4, 2), "llama"
    )
    with pytest.raises(AdapterError, match=r"no module 'model\.layers\.0\.ffn'"):
        resolve(models.build(models.named("llama")))
