"""LoRA and other adapters of PEFT: which parameters are collected, their gradients, and whose they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import fisherscope as fs
from fisherscope.adapters.tuned_heads import with_adapters
from fisherscope.adapters.unwrap import unwrap
from fisherscope.errors import AdapterError, CoverageError
from fisherscope.layout import ModelLayout, Partition
from tests import models

TOLERANCE = 1e-5
EXACT = (fs.Fisher(), fs.SampleGradients(parameters="all", dtype="float32"))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "llama": LINEAR,
    "qwen2": LINEAR,
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "bert": ["query", "key", "value", "dense"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}
QUERY = "model.layers.0.self_attn.q_proj"
# PEFT calls something in transformers by its former name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def lora(name: str = "llama", **changes: Any) -> peft.LoraConfig:
    options = {"target_modules": TARGETS[name], "r": 3, "init_lora_weights": False}
    return peft.LoraConfig(**(options | {"fan_in_fan_out": name == "gpt2"} | changes))


def adapted(config: peft.PeftConfig, name: str = "llama", layers: int | None = None) -> Any:
    """A model with an adapter of random numbers throughout."""
    model = peft.get_peft_model(models.build(models.named(name), layers=layers), config).eval()
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


# ---- the literal loop


def causal_loss(model: Any, batch: Any) -> Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return _summed(logits[:, :-1], batch.labels[:, 1:])


def masked_loss(model: Any, batch: Any) -> Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return _summed(logits, batch.labels)


def seq2seq_loss(model: Any, batch: Any) -> Tensor:
    start = torch.zeros_like(batch.input_ids[:, :1])
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        decoder_input_ids=torch.cat([start, batch.input_ids[:, :-1]], 1),
    ).logits
    return _summed(logits, batch.labels)


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)


LOSSES = {"bert": masked_loss, "t5": seq2seq_loss}


def loop(model: nn.Module, data: list[dict[str, Any]], name: str = "llama") -> dict[str, Tensor]:
    """One unpadded sample and one backward pass at a time, ``[n, *shape]`` for every parameter."""
    model.eval().requires_grad_(True)
    found: dict[str, list[Tensor]] = {key: [] for key, _ in model.named_parameters()}
    for row in data:

        class One:
            input_ids = torch.tensor([row["input_ids"]])
            attention_mask = torch.ones_like(input_ids)
            labels = torch.tensor([row["labels"]])

        model.zero_grad()
        LOSSES.get(name, causal_loss)(model, One).sum().backward()
        for key, parameter in model.named_parameters():
            nothing = torch.zeros_like(parameter)
            found[key].append(nothing if parameter.grad is None else parameter.grad.clone())
    model.zero_grad(set_to_none=True)
    return {key: torch.stack(values) for key, values in found.items()}


def collected(
    held: Any, data: list[dict[str, Any]], out: Path, name: str = "llama", **options: Any
) -> tuple[fs.Scope, Any]:
    scope = fs.wrap(held, **options)
    objective = LOSSES.get(name, "auto")
    store = scope.collect(
        {"a": data},
        out,
        extensions=EXACT,
        objective=objective,
        batch_size=3,
        durability="none",
        quiet=True,
    )
    return scope, store


def assert_exact(scope: fs.Scope, store: Any, expected: dict[str, Tensor]) -> None:
    largest = max(float(gradients.abs().max()) for gradients in expected.values())
    for parameter in scope.parameters:
        # a key bias moves all scores of a query alike, so that its gradient is rounding
        is_rounding = "key" in parameter and parameter.endswith(".bias")
        floor = largest if is_rounding else 1e-3 * largest
        error = models.relative_error(store.gradients("a", parameter), expected[parameter], floor=floor)
        assert error <= TOLERANCE, parameter


# ---- exactness


@pytest.mark.filterwarnings("ignore:.*chosen parameters are not instrumented")  # T5's table of positions
@pytest.mark.parametrize("name", TARGETS)
def test_gradients_equal_the_loop(name: str, tmp_path: Path) -> None:
    """The adapter's parameters by default, those of the model too by "all", and their groups.

    In float64: behind random adapters the loop in float32 itself is 1e-5 off, more or less by the processor.
    """
    held = adapted(lora(name, lora_bias=name in {"gpt2", "bert"}), name, layers=1).double()
    data = models.rows(5)
    scope, store = collected(held, data, tmp_path / "adapter.fs", name)
    every, more = collected(held, data, tmp_path / "all.fs", name, parameters="all")
    model = unwrap(held)
    names = [parameter for parameter, _ in model.named_parameters()]
    in_layers = [n for n in names if ".lora_" in n and every.layout.parameter(n).layer >= 0]
    assert list(scope.parameters) == in_layers
    missing = set(names) - set(every.parameters)
    assert all("relative_attention_bias" in parameter for parameter in missing)
    assert missing == set() or name == "t5"
    expected = loop(model, data, name)
    assert_exact(scope, store, expected)
    assert_exact(every, more, expected)
    for found, parameters in ((store, scope.parameters), (more, every.parameters)):
        _check_groups(found, {parameter: expected[parameter] for parameter in parameters})


def _check_groups(store: Any, expected: dict[str, Tensor]) -> None:
    """Squares of every head and channel, by slices of the loop's gradients."""
    values, table = store.group_values("a"), store.groups("a")
    squares: dict[tuple[Any, ...], Tensor] = {}

    def add(kind: str, part: Any, block: str, name: str, partition: Partition | None) -> None:
        if partition is None or partition.parameter not in expected:
            return
        pieces = partition.gather(expected[partition.parameter]).square().sum(2)
        for index, square in enumerate(pieces):
            key = (kind, part.stack, part.layer, block, index, name)
            squares[key] = squares.get(key, torch.zeros(())) + square

    for attention, block in store.layout.head_blocks():
        add("head", attention, block.name, "weight", block.weight)
        add("head", attention, block.name, "bias", block.bias)
    for mlp in store.layout.mlps:
        for name, partitions in (("weight", mlp.weights), ("bias", mlp.biases)):
            for partition in partitions:
                add("channel", mlp, mlp.block, name, partition)
    columns = ["kind", "stack", "layer", "block", "index", "part"]
    chosen = table["kind"].isin(["head", "channel"])
    places = [tuple(row) for row in table.loc[chosen, columns].itertuples(index=False)]
    assert set(places) == set(squares)
    assert len(places) == len(squares)
    assert any(place[3] in {"Q.default", "mlp.default"} for place in places)
    found = torch.from_numpy(values["square"].to_numpy()[:, chosen.to_numpy()]).float()
    wanted = torch.stack([squares[place] for place in places], 1)
    floor = 1e-4 * float(wanted.max())
    assert models.relative_error(found, wanted, floor=floor) <= 1e-4


HEADS = {
    # block: (projection, matrix, axis of it that heads lie on, first index of head 1)
    "llama": {
        "Q": ("self_attn.q_proj", "lora_B", 0, 8),
        "K": ("self_attn.k_proj", "lora_B", 0, 8),
        "V": ("self_attn.v_proj", "lora_B", 0, 8),
        "O": ("self_attn.o_proj", "lora_A", 1, 8),
    },
    "phi3": {
        "Q": ("self_attn.qkv_proj", "lora_B", 0, 8),
        "K": ("self_attn.qkv_proj", "lora_B", 0, 32 + 8),
        "V": ("self_attn.qkv_proj", "lora_B", 0, 32 + 16 + 8),
        "O": ("self_attn.o_proj", "lora_A", 1, 8),
    },
    "gpt2": {
        "Q": ("attn.c_attn", "lora_B", 0, 8),
        "K": ("attn.c_attn", "lora_B", 0, 32 + 8),
        "V": ("attn.c_attn", "lora_B", 0, 64 + 8),
        "O": ("attn.c_proj", "lora_A", 1, 8),
    },
}
HEADS["qwen2"] = HEADS["llama"]


@pytest.mark.parametrize("name", HEADS)
def test_heads_lie_in_the_matrix_beside_their_features(name: str, tmp_path: Path) -> None:
    """Cut by hand: rows of B for Q, K and V, columns of A for O; the other matrix belongs to no head."""
    held, data = adapted(lora(name), name), models.rows(4)
    _, store = collected(held, data, tmp_path / "run.fs", name)
    layers = "transformer.h" if name == "gpt2" else "model.layers"
    layout = store.layout
    for layer in (0, 1):
        for block, (projection, matrix, axis, start) in HEADS[name].items():
            path = f"{layers}.{layer}.{projection}"
            gradients = store.gradients("a", f"{path}.{matrix}.default.weight")
            by_hand = gradients.narrow(axis + 1, start, 8).flatten(1)
            found = store.slice("a", layer=layer, block=f"{block}.default", head=1)
            assert torch.equal(found, by_hand)
            other = "lora_A" if matrix == "lora_B" else "lora_B"
            assert layout.flags(f"{path}.{other}.default.weight") == {"shared"}
            flags = layout.flags(f"{path}.{matrix}.default.weight")
            assert flags >= ({"per_group"} if block in "KV" and name != "gpt2" else {"per_head"})
        kinds = {layout.parameter(n).kind for n in store.parameters if f"{layers}.{layer}." in n}
        assert kinds == {"attention", "mlp"}
        assert all(layout.parameter(n).layer == layer for n in store.parameters if f"{layers}.{layer}." in n)


@pytest.mark.parametrize("name", HEADS)
def test_a_change_of_a_slice_moves_its_head_alone(name: str) -> None:
    """Rows of B changed on the live model: the contexts of the heads that use them move, and no others."""
    model: Any = unwrap(adapted(lora(name), name))
    layout = fs.wrap(model).layout
    attention = layout.attention[0]
    ids = torch.arange(3, 12)[None]

    def context() -> Tensor:
        kept: list[Tensor] = []
        module = model.get_submodule(attention.output)
        handle = module.register_forward_pre_hook(lambda _module, args: kept.append(args[0].detach()))
        with torch.no_grad():
            model(input_ids=ids)
        handle.remove()
        return kept[0]

    plain = context()
    for block in ("Q", "K", "V"):
        found = attention.block(f"{block}.default")
        for head in range(found.heads):
            piece = found.weight[head]
            weight = model.get_parameter(piece.parameter)
            before = weight.detach().clone()
            with torch.no_grad():
                piece.take(weight).add_(1.0)
            changes = (context() - plain).abs().unflatten(-1, (4, 8)).amax((0, 1, 3))
            with torch.no_grad():
                weight.copy_(before)
            moved = {h for h in range(4) if changes[h] > 1e-6}
            assert moved == (set(attention.query_heads(head)) if block in "KV" else {head})


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "biases of its own": {"lora_bias": True},
    "biases beside it": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "some projections": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "other ranks": {"rank_pattern": {"k_proj": 5}, "alpha_pattern": {"k_proj": 40}},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora_are_exact(variant: str, tmp_path: Path) -> None:
    """Scales, biases, ranks, starts: everything that trains is collected, and nothing else."""
    held, data = (
        adapted(lora(**VARIANTS[variant]), "llama-biases" if "bias" in variant else "llama", layers=1),
        models.rows(4),
    )
    model = unwrap(held)
    trains = {
        n for n, p in model.named_parameters() if p.requires_grad and ".layers." in n and "norm" not in n
    }
    scope, store = collected(held, data, tmp_path / "run.fs")
    assert set(scope.parameters) == trains
    assert_exact(scope, store, loop(model, data))


def test_dropout_is_out_of_action(tmp_path: Path) -> None:
    """A model in training mode with dropout in LoRA has the gradients of evaluation; modes come back."""
    held, data = adapted(lora(lora_dropout=0.5)), models.rows(4)
    held.train()
    scope, store = collected(held, data, tmp_path / "run.fs")
    assert all(module.training for module in held.modules())
    assert_exact(scope, store, loop(unwrap(held), data))


# ---- which adapters are in use


def _two(active: list[str]) -> Any:
    held = adapted(lora())
    held.add_adapter("other", lora(r=2, target_modules=["q_proj", "o_proj", "down_proj"]))
    held.base_model.set_adapter(active)
    randomise(held)
    return held


def test_names_that_begin_alike() -> None:
    """One adapter's name may begin with another's; the parameters of either are told apart."""
    held = adapted(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    held.add_adapter("default_2", peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    held.set_adapter("default_2")
    scope = fs.wrap(held)
    assert all(name.endswith(".default_2") for name in scope.parameters)
    coverage = scope.coverage().set_index("parameter")["reason"]
    path = "model.layers.0.self_attn.k_proj.ia3_l"
    assert coverage[f"{path}.default"] == "adapter 'default' is not active"
    assert coverage[f"{path}.default_2"] == ""


def test_two_adapters_at_once(tmp_path: Path) -> None:
    """Each has blocks, channels and parameters of its own, and all analyses tell them apart."""
    held, data = _two(["default", "other"]), models.rows(6)
    scope = fs.wrap(held, parameters="all")
    store = scope.collect(
        {"a": data[:3], "b": data[3:]}, tmp_path / "run.fs", extensions=EXACT, batch_size=3, quiet=True
    )
    names = [block.name for block in scope.layout.attention[0].blocks]
    assert names == ["Q", "K", "V", "O", *(f"{b}.default" for b in "QKVO"), "Q.other", "O.other"]
    assert [m.block for m in scope.layout.mlps] == ["mlp"] * 2 + ["mlp.default"] * 2 + ["mlp.other"] * 2
    expected = loop(unwrap(held), data[:3])
    assert_exact(scope, store, expected)
    _check_groups(store, {name: expected[name] for name in scope.parameters})
    report = fs.analyze(store)
    for analysis in ("fisher", "importance", "interference"):
        data_ = report[analysis].data
        assert data_["block"].to_numpy().tolist() == names
    ranked = report["importance"].frame.query("kind == 'head' and task == 'a'")
    assert sorted(ranked["rank"]) == list(range(1, len(ranked) + 1))
    matrix = fs.analyses.interference.matrix(store, "a", "b", layer=1, block="O.other", head=3)
    assert matrix.shape == (3, 3)


def test_an_adapter_that_is_not_active_is_named(tmp_path: Path) -> None:
    """Only what computes is collected; patterns that ask for the rest are answered in the coverage."""
    held, data = _two(["other"]), models.rows(4)
    scope, store = collected(held, data, tmp_path / "run.fs")
    assert scope.parameters
    assert all(".other." in name for name in scope.parameters)
    assert_exact(scope, store, loop(unwrap(held), data))
    coverage = scope.coverage()
    idle = coverage[coverage["parameter"].str.contains(r"\.default\.")]
    assert set(idle["reason"]) == {"adapter 'default' is not active"}
    assert not idle["selected"].any()
    assert not set(idle["parameter"]) & set(fs.wrap(held, parameters="all").parameters)
    with pytest.warns(UserWarning, match="adapter 'default' is not active: 4"):
        asked = fs.wrap(held, parameters=["*q_proj.lora_*"])
    assert {name.split(".")[-2] for name in asked.parameters} == {"other"}


def _merged() -> Any:
    held = adapted(lora())
    held.merge_adapter()
    return held


def _disabled() -> Any:
    held = adapted(lora())
    held.base_model.disable_adapter_layers()
    return held


@pytest.mark.parametrize(("make", "state"), [(_merged, "merged into the weight"), (_disabled, "disabled")])
def test_without_an_adapter_in_use_the_weights_are_collected(
    make: Callable[[], Any], state: str, tmp_path: Path
) -> None:
    """As of the plain model that it is; what the adapter holds is named, and cannot be asked for."""
    held, data = make(), models.rows(4)
    with pytest.warns(UserWarning, match=rf"no adapter of PEFT is in use.*{state}.*unmerge_adapter"):
        scope, store = collected(held, data, tmp_path / "run.fs")
    assert len(scope.parameters) == 2 * len(LINEAR)
    assert all(name.endswith(".base_layer.weight") for name in scope.parameters)
    coverage = scope.coverage()
    adapter = coverage[coverage["parameter"].str.contains("lora_")]
    assert set(adapter["reason"]) == {f"adapter 'default' is {state}"}
    with pytest.raises(CoverageError, match=rf"lora_A\.default\.weight: adapter 'default' is {state}"):
        fs.wrap(held, parameters=["*lora_*"])
    assert_exact(scope, store, loop(unwrap(held), data))


def test_one_adapter_merged_while_another_is_active() -> None:
    """PEFT then computes with the merged weight alone."""
    held = _two(["default", "other"])
    held.base_model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="no adapter of PEFT is in use"):
        coverage = fs.wrap(held).coverage().set_index("parameter")["reason"]
    assert coverage[f"{QUERY}.lora_A.other.weight"] == (
        "adapter 'other' is out of use while another one is merged"
    )


def test_copies_that_are_trained(tmp_path: Path) -> None:
    """The copy of a module in ``modules_to_save`` is collected, its original is named as out of use."""
    held = adapted(lora(target_modules=["q_proj"], modules_to_save=["mlp", "lm_head"]))
    data = models.rows(4)
    scope, store = collected(held, data, tmp_path / "run.fs", parameters="all")
    model = unwrap(held)
    copies = [n for n, _ in model.named_parameters() if ".modules_to_save.default." in n]
    originals = [n for n, _ in model.named_parameters() if ".original_module." in n]
    assert len(copies) == len(originals) == 7
    assert set(copies) <= set(scope.parameters)
    assert not set(originals) & set(scope.parameters)
    reasons = scope.coverage().set_index("parameter")["reason"]
    assert set(reasons[originals]) == {"adapter 'default' has a copy in its place"}
    default = fs.wrap(held).parameters
    assert {n for n in default if "mlp" in n} == {n for n in copies if "mlp" in n}
    assert all("lora_" in n or n in copies for n in default)
    expected = loop(model, data)
    assert_exact(scope, store, expected)
    heads = store.groups("a").query("kind == 'channel'")
    assert set(heads["block"]) == {"mlp"}


def test_an_original_that_is_tied_is_in_use() -> None:
    """An embedding whose copy is trained is still the weight of the output layer."""
    config = lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        held = peft.get_peft_model(models.build(models.named("qwen2-tied-mqa")), config)
    scope = fs.wrap(held, parameters="all")
    assert "model.embed_tokens.original_module.weight" in scope.parameters
    assert "model.embed_tokens.modules_to_save.default.weight" in scope.parameters


def test_parameters_beside_the_layers_and_the_base_are_on_request() -> None:
    """Matrices of the output layer belong to "all"; weights of the model come by name."""
    held = adapted(lora(target_modules=["q_proj", "lm_head", "embed_tokens"]))
    layout = fs.wrap(held).layout
    assert set(fs.wrap(held).parameters) == {
        f"model.layers.{i}.self_attn.q_proj.lora_{m}.default.weight" for i in (0, 1) for m in "AB"
    }
    assert set(fs.wrap(held, parameters="attention").parameters) == set(fs.wrap(held).parameters)
    assert layout.parameter("lm_head.lora_A.default.weight").kind == "output"
    assert layout.parameter("lm_head.base_layer.weight").kind == "output"
    assert layout.parameter("model.embed_tokens.lora_embedding_A.default").kind == "embedding"
    base = fs.wrap(held, parameters=["*q_proj.base_layer.weight"])
    assert base.parameters == tuple(f"model.layers.{i}.self_attn.q_proj.base_layer.weight" for i in (0, 1))


def test_attention_is_the_adapters_of_attention() -> None:
    """Its matrices, and none of the MLP's."""
    scope = fs.wrap(adapted(lora()), parameters="attention")
    assert len(scope.parameters) == 2 * 2 * 4
    assert all("self_attn" in name and "lora_" in name for name in scope.parameters)


# ---- DoRA and other tuners


def test_dora(tmp_path: Path) -> None:
    """Matrices and magnitudes are exact, and so are the heads of both."""
    held, data = adapted(lora(use_dora=True)), models.rows(4)
    scope, store = collected(held, data, tmp_path / "run.fs", parameters="all")
    assert len(fs.wrap(held).parameters) == 3 * 2 * len(LINEAR)
    expected = loop(unwrap(held), data)
    assert_exact(scope, store, expected)
    _check_groups(store, {name: expected[name] for name in scope.parameters})
    magnitudes = expected[f"{QUERY}.lora_magnitude_vector.default.weight"]
    found = store.slice("a", layer=0, block="Q.default.magnitude", head=2)
    assert models.relative_error(found, magnitudes[:, 16:24]) <= TOLERANCE


OTHERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "ia3": lambda: peft.IA3Config(target_modules=LINEAR, feedforward_modules=["o_proj", "down_proj"]),
    "loha": lambda: peft.LoHaConfig(target_modules=LINEAR, r=4, init_weights=False),
    "vera": lambda: peft.VeraConfig(target_modules=LINEAR, r=4),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=LINEAR, init_r=4, total_step=10),
    "lokr": lambda: peft.LoKrConfig(target_modules=LINEAR, r=4, init_weights=False),
    "vblora": lambda: peft.VBLoRAConfig(
        target_modules=["q_proj", "o_proj"], r=4, num_vectors=8, vector_length=4
    ),
}


@pytest.mark.parametrize("tuner", OTHERS)
def test_other_tuners_are_exact(tuner: str, tmp_path: Path) -> None:
    """Parameters that PEFT's layers multiply with themselves: the layer is run again for each sample."""
    held, data = adapted(OTHERS[tuner](), layers=1), models.rows(4)
    model = unwrap(held)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(fs.wrap(held).parameters) == trains
    scope, store = collected(held, data, tmp_path / "run.fs", parameters="all")
    assert trains <= set(scope.parameters)
    expected = loop(model, data)
    assert_exact(scope, store, expected)
    if tuner == "ia3":
        factors = expected[f"{QUERY}.ia3_l.default"]
        found = store.slice("a", layer=0, block="Q.default", head=2)
        assert models.relative_error(found, factors[:, 16:24, 0]) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:Unsupported layer type .*RMSNorm:UserWarning")
def test_tuned_norms(tmp_path: Path) -> None:
    """LN tuning trains copies of norms: they are what is collected, exactly."""
    held = adapted(peft.LNTuningConfig(target_modules=["input_layernorm"]))
    data = models.rows(4)
    scope, store = collected(held, data, tmp_path / "run.fs")
    assert scope.parameters == tuple(
        f"model.layers.{i}.input_layernorm.ln_tuning_layers.default.weight" for i in (0, 1)
    )
    assert_exact(scope, store, loop(unwrap(held), data))


def test_prompt_tuning_is_refused() -> None:
    """Its tokens live in PEFT's own forward: the model inside would be another one."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(AdapterError, match="virtual tokens"):
        fs.wrap(peft.get_peft_model(models.build(models.named("llama")), config))


# ---- the layout


@pytest.mark.parametrize("name", TARGETS)
def test_the_layout_survives_json(name: str) -> None:
    """With blocks and MLPs of adapters; those of a model without PEFT are written as before."""
    layout = fs.wrap(adapted(lora(name), name)).layout
    again = ModelLayout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    plain = fs.wrap(models.build(models.named(name))).layout
    assert all("block" not in mlp for mlp in plain.to_json()["mlps"])
    assert plain is with_adapters(models.build(models.named(name)), plain)


def test_groups_of_the_model_itself_keep_their_order() -> None:
    """The table of a model with LoRA, without the adapter's rows, is that of the model."""
    plain = models.build(models.named("llama"))
    own = fs.layout.GroupTable.build(fs.wrap(plain).layout, [n for n, _ in plain.named_parameters()]).frame()
    layout = fs.wrap(adapted(lora())).layout
    both = fs.layout.GroupTable.build(layout, [info.name for info in layout.parameters]).frame()
    kept = both[~both["block"].str.contains("default") & ~both["parameter"].str.contains("lora_")]
    kept = kept.assign(parameter=kept["parameter"].str.replace(".base_layer", "")).reset_index(drop=True)
    assert kept.equals(own)


def test_routers_stay_routers() -> None:
    """A gate of experts with LoRA around it is not taken for a map of the MLP, and not part of "linear"."""
    model = models.build(models.named("qwen2_moe"))
    scope = fs.wrap(peft.get_peft_model(model, lora(target_modules=["q_proj", "shared_expert_gate"])))
    gates = [info for info in scope.layout.parameters if "shared_expert_gate" in info.name]
    assert {info.name.split("shared_expert_gate.")[1] for info in gates} == {
        "base_layer.weight",
        "lora_A.default.weight",
        "lora_B.default.weight",
    }
    assert {info.kind for info in gates} == {"router"}
    assert {name.split(".")[-4] for name in scope.parameters} == {"q_proj"}


@pytest.mark.parametrize(
    ("tuner", "expected"),
    [
        ("ia3", {"Q": "ia3_l", "K": "ia3_l", "V": "ia3_l", "O": "ia3_l"}),
        ("vera", {"Q": "vera_lambda_b", "K": "vera_lambda_b", "V": "vera_lambda_b"}),
        ("adalora", {"Q": "lora_B", "K": "lora_B", "V": "lora_B", "O": "lora_A"}),
        ("loha", {}),
    ],
)
def test_heads_of_other_tuners(tuner: str, expected: dict[str, str]) -> None:
    """Factors of features have the heads of their features; what mixes features has none."""
    model: Any = unwrap(adapted(OTHERS[tuner]()))
    layout = fs.wrap(model, parameters=["*.base_layer.*"]).layout
    blocks = {block.name: block.weight for block in layout.attention[0].blocks if "." in block.name}
    assert {name: weight.parameter.split(".")[-2] for name, weight in blocks.items()} == {
        f"{block}.default": kind for block, kind in expected.items()
    }
    for name, weight in blocks.items():
        assert tuple(model.get_parameter(weight.parameter).shape) == weight.shape
        assert weight.starts == layout.attention[0].block(name[0]).weight.starts
    channels = [mlp for mlp in layout.mlps if mlp.block == "mlp.default"]
    assert len(channels) == (2 if expected else 0)
    assert all(len(mlp.weights) == (2 if tuner == "vera" else 3) for mlp in channels)


def test_latent_attention() -> None:
    """DeepSeek's joined keys and values: the adapter's rows are cut as those of the weight are."""
    held = peft.get_peft_model(
        models.build(models.named("deepseek_v3")), lora(target_modules=["q_b_proj", "kv_b_proj", "o_proj"])
    )
    attention = fs.wrap(held).layout.attention[0]
    assert [block.name for block in attention.blocks] == [
        "Q",
        "K",
        "V",
        "O",
        *(f"{b}.default" for b in "QKVO"),
    ]
    for block in "QKVO":
        own, added = attention.block(block).weight, attention.block(f"{block}.default").weight
        assert (added.starts, added.width) == (own.starts, own.width)
        assert added.axis == own.axis


@pytest.mark.filterwarnings("ignore:no adapter is registered")
def test_a_model_type_that_is_detected(tmp_path: Path) -> None:
    """Heads that were found from the structure have their part of the adapter, too."""
    config = transformers.XGLMConfig(
        d_model=32, num_layers=2, attention_heads=4, ffn_dim=40, vocab_size=models.VOCABULARY,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(config)
    held = peft.get_peft_model(plain, lora(target_modules=["q_proj", "out_proj", "fc2"]))
    data = models.rows(4)
    scope, store = collected(held.eval(), data, tmp_path / "run.fs")
    assert scope.layout.source == "detected"
    names = [block.name for block in scope.layout.attention[0].blocks]
    assert names == ["Q", "K", "V", "O", "Q.default", "O.default"]
    assert_exact(scope, store, loop(unwrap(held), data))
