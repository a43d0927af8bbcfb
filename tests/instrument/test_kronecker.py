"""Kronecker factors of linear maps, against sums over single positions by hand."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fisherscope as fs
from fisherscope.errors import CoverageError, Interrupted, NotStoredError
from fisherscope.store.kronecker import KroneckerFactors
from tests import models
from tests.instrument import by_hand
from tests.instrument.interrupting import interrupted_after

TOLERANCE = 1e-5


def _factors_by_hand(each: list[by_hand.Factors], tokens: list[int], *, bias: bool) -> tuple[Tensor, Tensor]:
    """A and S, one position after the other."""
    inputs, outputs = each[0].a.shape[1] + bias, each[0].d.shape[1]
    A, S = torch.zeros(inputs, inputs).double(), torch.zeros(outputs, outputs).double()
    positions = 0
    for sample, count in zip(each, tokens, strict=True):
        for a, d in zip(sample.a, sample.d, strict=True):
            extended = torch.cat([a, torch.ones(1).double()]) if bias else a
            A += torch.outer(extended, extended)
            S += torch.outer(d, d) / count
            positions += 1
    return A / positions, S / len(each)


def _maps(scope: fs.Scope) -> list[str]:
    """Paths of the instrumented linear maps, found by type alone."""
    return [
        path
        for path, module in scope.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and f"{path}.weight" in scope.parameters
    ]


def _assert_equal(
    found: KroneckerFactors, each: list[by_hand.Factors], tokens: list[int], *, bias: bool, floor: float = 0.0
) -> None:
    A, S = _factors_by_hand(each, tokens, bias=bias)
    assert found.with_bias is bias
    assert found.A.dtype == found.S.dtype == torch.float32
    assert models.relative_error(found.A, A) <= TOLERANCE, found.module
    assert models.relative_error(found.S, S, floor=floor) <= TOLERANCE, found.module
    assert found.samples == len(each)
    assert found.positions == sum(len(sample.a) for sample in each)


@pytest.mark.parametrize(("name", "side"), by_hand.CASES)
def test_factors_equal_sums_over_positions(name: str, side: str, tmp_path: Path) -> None:
    """A and S of every linear map, with biases, padded on either side, over several batches."""
    data, loss = by_hand.data_of(name)
    model = models.build(models.named(name))
    scope = fs.wrap(model, models.PadsOnTheLeft() if side == "left" else None)
    store = scope.collect(
        {"a": data}, tmp_path / "run.fs", extensions=("kronecker",), batch_size=3, quiet=True
    )
    maps = _maps(scope)
    assert len(maps) >= 8
    expected = by_hand.factors(model, maps, data, loss)
    tokens = store.samples("a")["tokens"].tolist()
    for path in maps:
        each = [sample[path] for sample in expected]
        found = store.kronecker("a", path)
        bias = getattr(model.get_submodule(path), "bias", None) is not None
        _assert_equal(found, each, tokens, bias=bias)


def test_heads_of_a_fused_projection(tmp_path: Path) -> None:
    """GPT-2's c_attn: S of a head of Q, K or V is that of the head's own output gradients; O cuts A."""
    model = models.build(models.named("gpt2"))
    scope = fs.wrap(model)
    data = models.rows(5)
    store = scope.collect({"a": data}, tmp_path / "run.fs", extensions=("kronecker",), quiet=True)
    fused, output = "transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"
    expected = by_hand.factors(model, [fused, output], data, by_hand.causal)
    tokens = [models.tokens(row) for row in data]
    for place, block in enumerate("QKV"):
        for head in range(4):
            first = 32 * place + 8 * head
            each = [by_hand.Factors(s[fused].a, s[fused].d[:, first : first + 8]) for s in expected]
            found = store.kronecker("a", fused).head(block, head)
            assert found.S.shape == (8, 8)
            floor = float(store.kronecker("a", fused).S.abs().max())
            _assert_equal(found, each, tokens, bias=True, floor=floor)
    for head in range(4):
        cut = slice(8 * head, 8 * head + 8)
        each = [by_hand.Factors(s[output].a[:, cut], s[output].d) for s in expected]
        _assert_equal(store.kronecker("a", output).head("O", head), each, tokens, bias=False)
    with pytest.raises(IndexError, match="4 heads"):
        store.kronecker("a", output).head("O", 4)
    with pytest.raises(KeyError, match=r"\['Q', 'K', 'V'\]"):
        store.kronecker("a", fused).head("O", 0)


def test_key_and_value_heads_are_kv_heads(tmp_path: Path) -> None:
    """With grouped queries K and V have fewer slices than Q, each as wide as a head."""
    model = models.build(models.named("qwen2"))
    store = fs.wrap(model).collect(
        {"a": models.rows(4)}, tmp_path / "run.fs", extensions=("kronecker",), quiet=True
    )
    for block, heads in (("q", 4), ("k", 2), ("v", 2)):
        factors = store.kronecker("a", f"model.layers.0.self_attn.{block}_proj")
        for head in range(heads):
            cut = slice(8 * head, 8 * head + 8)
            assert torch.equal(factors.head(block.upper(), head).S, factors.S[cut, cut])
            assert torch.equal(factors.head(block.upper(), head).A, factors.A)
        with pytest.raises(IndexError, match=f"{heads} heads"):
            factors.head(block.upper(), heads)


def test_heads_of_an_adapter(tmp_path: Path) -> None:
    """LoRA cuts the output of B beside Q, and the input of A beside O."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(models.build(models.named("llama")), config).eval()
    store = fs.wrap(model).collect(
        {"a": models.rows(4)}, tmp_path / "run.fs", extensions=("kronecker",), quiet=True
    )
    cut = slice(8, 16)
    queries = store.kronecker("a", "model.layers.1.self_attn.q_proj.lora_B.default")
    assert torch.equal(queries.head("Q.default", 1).S, queries.S[cut, cut])
    assert torch.equal(queries.head("Q.default", 1).A, queries.A)
    outputs = store.kronecker("a", "model.layers.1.self_attn.o_proj.lora_A.default")
    assert torch.equal(outputs.head("O.default", 1).A, outputs.A[cut, cut])
    assert torch.equal(outputs.head("O.default", 1).S, outputs.S)


@pytest.mark.filterwarnings("ignore:task 'a' has a single sample")
def test_a_single_position_is_exact(tmp_path: Path) -> None:
    """One sample of one position: the Kronecker product of the factors is g g', bias included."""
    model = models.build(models.named("bert"))
    store = fs.wrap(model).collect(
        {"a": [{"input_ids": [7], "labels": [9]}]},
        tmp_path / "run.fs",
        extensions=("kronecker", fs.SampleGradients(parameters="all", dtype="float32")),
        quiet=True,
    )
    for path in ("encoder.layer.0.attention.self.value", "encoder.layer.1.intermediate.dense"):
        factors = store.kronecker("a", f"bert.{path}")
        weight = store.gradients("a", f"bert.{path}.weight")[0]
        bias = store.gradients("a", f"bert.{path}.bias")[0]
        g = torch.cat([weight, bias.unsqueeze(1)], 1)
        by_row, by_column = g.flatten(), g.T.flatten()
        assert float(by_row.norm()) > 0
        product = torch.kron(factors.S, factors.A)
        assert models.relative_error(product, torch.outer(by_row, by_row)) <= TOLERANCE
        product = torch.kron(factors.A, factors.S)
        assert models.relative_error(product, torch.outer(by_column, by_column)) <= TOLERANCE


def test_a_map_that_is_called_twice(tmp_path: Path) -> None:
    """Each use of a position is a term: A is the mean over both uses, S their sum."""
    model = models.build(models.named("llama"))
    path = "model.layers.0.mlp.down_proj"
    by_hand.call_twice(model.get_submodule(path))
    data = models.rows(5)
    store = fs.wrap(model, models.PadsOnTheLeft(), parameters=[f"{path}.weight"]).collect(
        {"a": data}, tmp_path / "run.fs", extensions=("kronecker",), batch_size=2, quiet=True
    )
    each = [sample[path] for sample in by_hand.factors(model, [path], data, by_hand.causal)]
    assert all(len(sample.a) == 2 * len(row["input_ids"]) for sample, row in zip(each, data, strict=True))
    _assert_equal(store.kronecker("a", path), each, [models.tokens(row) for row in data], bias=False)


def test_classifiers_see_one_vector_per_sample(tmp_path: Path) -> None:
    """The classifier of images sees no positions: its A is the mean over samples."""
    model = models.build(models.named("vit"))
    scope = fs.wrap(model, parameters=["classifier.*", "*q_proj*", "*attention.query*"])
    generator = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "label": i} for i in range(3)]
    store = scope.collect({"a": data}, tmp_path / "run.fs", extensions=("kronecker",), quiet=True)
    inputs: list[Tensor] = []
    handle = model.classifier.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    with torch.no_grad():
        model(pixel_values=torch.stack([row["pixel_values"] for row in data]))
    handle.remove()
    a = torch.cat([inputs[0], torch.ones(3, 1)], 1).double()
    found = store.kronecker("a", "classifier")
    assert found.positions == 3
    assert models.relative_error(found.A, a.T @ a / 3) <= TOLERANCE
    query = scope.layout.attention[0].block("Q").weight.parameter.removesuffix(".weight")
    assert store.kronecker("a", query).positions == 3 * 5  # patches, class token


def test_a_bias_that_is_not_instrumented_has_no_row(tmp_path: Path) -> None:
    """A has a row for the bias exactly where the bias was chosen."""
    scope = fs.wrap(models.build(models.named("gpt2")), parameters=["*.c_attn.weight"])
    store = scope.collect({"a": models.rows(3)}, tmp_path / "run.fs", extensions=("kronecker",), quiet=True)
    found = store.kronecker("a", "transformer.h.0.attn.c_attn")
    assert not found.with_bias
    assert found.A.shape == (32, 32)
    assert found.S.shape == (96, 96)


def test_what_has_no_factors_is_named_once(tmp_path: Path) -> None:
    """Experts with stacked weights are named in one warning for all tasks; reading them says why."""
    scope = fs.wrap(models.build(models.named("mixtral")), parameters="all")
    tasks = {"a": models.rows(3), "b": models.rows(3, seed=1)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = scope.collect(tasks, tmp_path / "run.fs", extensions=("kronecker",), batch_size=2, quiet=True)
    (warning,) = [str(w.message) for w in caught if "Kronecker" in str(w.message)]
    assert "model.layers.0.mlp.experts.gate_up_proj" in warning
    assert "model.layers.1.mlp.gate.weight" in warning
    assert "norm" not in warning
    assert store.kronecker("b", "lm_head").S.shape == (models.VOCABULARY, models.VOCABULARY)
    with pytest.raises(NotStoredError, match=r"of 'model\.layers\.1\.mlp\.gate'.*warned"):
        store.kronecker("a", "model.layers.1.mlp.gate")


def test_tied_embeddings_have_no_factors(tmp_path: Path) -> None:
    """A head whose weight is a table of embeddings, too, is named with that reason."""
    scope = fs.wrap(models.build(models.named("gpt2")), parameters=["transformer.wte.weight", "*c_attn.*"])
    with pytest.warns(UserWarning, match=r"transformer\.wte\.weight: it is also used as a table"):
        scope.collect({"a": models.rows(3)}, tmp_path / "run.fs", extensions=("kronecker",), quiet=True)


def test_what_to_collect(tmp_path: Path) -> None:
    """A store without factors, a map that was left out and one that does not exist say so."""
    scope = fs.wrap(models.build(models.named("llama")), parameters="attention")
    data = {"a": models.rows(3)}
    plain = scope.collect(data, tmp_path / "plain.fs", extensions=("fisher",), quiet=True)
    with pytest.raises(NotStoredError, match=r"extensions=\(\.\.\., 'kronecker'\)"):
        plain.kronecker("a", "model.layers.0.self_attn.q_proj")
    chosen = (fs.Kronecker(parameters=["*.q_proj.*"]),)
    store = scope.collect(data, tmp_path / "some.fs", extensions=chosen, quiet=True)
    assert store.kronecker("a", "model.layers.0.self_attn.q_proj").samples == 3
    with pytest.raises(NotStoredError, match="left it out"):
        store.kronecker("a", "model.layers.0.self_attn.k_proj")
    with pytest.raises(NotStoredError, match="was not instrumented"):
        store.kronecker("a", "model.layers.0.mlp.up_proj")
    with pytest.raises(KeyError, match="no parameter"):
        store.kronecker("a", "model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(CoverageError, match="matches no instrumented weight"):
        scope.collect(data, tmp_path / "none.fs", extensions=(fs.Kronecker(["*.mlp.*"]),), quiet=True)
    with pytest.raises(ValueError, match="use 'attention', 'all'"):
        fs.Kronecker(parameters="linear")


def test_a_resumed_run_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after the third batch and run again: the factors of an uninterrupted run."""

    def collect(out: Path) -> fs.ContributionStore:
        scope = fs.wrap(models.build(models.named("gpt2")))
        tasks = {"a": models.rows(13)}
        return scope.collect(tasks, out, extensions=("kronecker",), batch_size=2, quiet=True)

    with interrupted_after(3, monkeypatch), pytest.raises(Interrupted):
        collect(tmp_path / "run.fs")
    assert fs.open_store(tmp_path / "run.fs").kronecker("a", "transformer.h.0.mlp.c_fc").samples == 6
    resumed, whole = collect(tmp_path / "run.fs"), collect(tmp_path / "whole.fs")
    for path in ("transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_attn"):
        one, other = resumed.kronecker("a", path), whole.kronecker("a", path)
        assert torch.equal(one.A, other.A)
        assert torch.equal(one.S, other.S)
        assert (one.samples, one.positions) == (other.samples, other.positions)
