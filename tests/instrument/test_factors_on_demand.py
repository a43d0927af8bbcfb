"""Factors of chosen samples, computed again with the model, against stored ones and against gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherscope as fs
from fisherscope.errors import CoverageError, FingerprintError
from fisherscope.linalg import Factored
from fisherscope.store import ContributionStore
from tests import models
from tests.instrument import by_hand

FACTORED = (fs.SampleGradients("all", "factored", "float32"),)
PLACES = [6, 0, 2]  # another order than that of the batches, and unequal lengths
IDS = [f"a_{place}" for place in PLACES]


def collected(scope: fs.Scope, name: str, out: Path, *extensions: Any) -> ContributionStore:
    """All rows of a kind of model, in batches with padding."""
    data, _ = by_hand.data_of(name)
    return scope.collect({"a": data}, out, extensions=extensions, batch_size=3, quiet=True)


def wrapped(name: str, side: str = "right", **options: Any) -> fs.Scope:
    tokenizer = models.PadsOnTheLeft() if side == "left" else None
    return fs.wrap(models.build(models.named(name)), tokenizer, **options)


def stored_pair(store: ContributionStore, parameter: str, row: int) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients out of the store, without padding."""
    found = store.per_sample("a", parameter, [row])
    assert isinstance(found, Factored)
    is_transposed = parameter in store.header.encodings.transposed
    d, a = (found.right, found.left) if is_transposed else (found.left, found.right)
    return a[0], d[0]


@pytest.mark.parametrize(
    ("name", "side"), [("gpt2", "left"), ("llama", "right"), ("bert", "right"), ("t5", "right")]
)
def test_factors_are_those_that_a_collection_stores(name: str, side: str, tmp_path: Path) -> None:
    """Every weight of a linear map, in the order asked for, from a store of group values alone.

    Left padding, transposed weights and both sides of an encoder-decoder included.
    """
    scope = wrapped(name, side)
    groups = collected(scope, name, tmp_path / "groups.fs")
    full = collected(scope, name, tmp_path / "full.fs", *FACTORED)
    found = scope.factors(groups, IDS)
    factored = [p for p in full.gradient_parameters if full.encoding(p) == "factored"]
    assert list(found) == IDS
    assert factored
    largest = max(float(full.gradients("a", p).abs().max()) for p in factored)
    for sample, place in zip(IDS, PLACES, strict=True):
        assert list(found[sample]) == factored
        for parameter, (a, d) in found[sample].items():
            expected_a, expected_d = stored_pair(full, parameter, place)
            assert (a.dtype, d.dtype, a.device.type) == (torch.float32, torch.float32, "cpu")
            assert models.relative_error(a, expected_a) <= 1e-5, parameter
            assert models.relative_error(d, expected_d, floor=1e-3 * largest) <= 1e-5, parameter


def test_their_products_are_the_gradients(tmp_path: Path) -> None:
    """``g = sum_t d_t a_t'``, for the samples' own gradients; chosen patterns only."""
    scope = wrapped("llama")
    store = collected(scope, "llama", tmp_path / "run.fs")
    patterns = ["*layers.1*q_proj.weight", "*layers.1*o_proj.weight"]
    found = scope.factors(store, IDS, parameters=patterns)
    gradients = scope.gradients(store, IDS, parameters=patterns)
    for place, sample in enumerate(IDS):
        assert found[sample].keys() == gradients.keys()
        for parameter, (a, d) in found[sample].items():
            assert models.relative_error(d.T @ a, gradients[parameter][place]) <= 1e-5


def test_rows_have_the_positions_of_the_sample(tmp_path: Path) -> None:
    """No padding is left, however samples are batched; an id that is given twice counts once."""
    scope = wrapped("llama", parameters="attention")
    store = collected(scope, "llama", tmp_path / "run.fs")
    found = scope.factors(store, [*IDS, IDS[0]])
    assert list(found) == IDS
    lengths = store.samples("a")["length"]
    for sample, place in zip(IDS, PLACES, strict=True):
        assert {len(x) for pair in found[sample].values() for x in pair} == {lengths[place]}
    assert list(scope.factors(store, "a_1")) == ["a_1"]  # type: ignore[arg-type]


def test_a_map_that_the_loss_does_not_depend_on_has_zeros(tmp_path: Path) -> None:
    """The last layer's queries, where the loss is taken of something before it."""
    model = models.build(models.named("llama"))

    def loss(model: Any, batch: Any) -> Tensor:
        hidden = model.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        ).hidden_states[1]
        inside = batch.attention_mask.unsqueeze(2)
        return (hidden.float() * inside).square().sum((1, 2))

    scope = fs.wrap(model, parameters="attention")
    store = scope.collect(
        {"a": models.rows(4)}, tmp_path / "run.fs", extensions=(), objective=loss, batch_size=2, quiet=True
    )
    (pairs,) = scope.factors(store, ["a_1"], objective=loss).values()
    a, d = pairs["model.layers.1.self_attn.q_proj.weight"]
    assert a.shape == d.shape == (store.samples("a")["length"][1], 32)
    assert not a.any()
    assert not d.any()
    assert pairs["model.layers.0.self_attn.q_proj.weight"][1].any()


def test_what_is_no_sum_over_positions_is_refused(tmp_path: Path) -> None:
    """Biases are asked for by name only; by default there are the weights of linear maps."""
    scope = wrapped("llama-biases")
    store = collected(scope, "llama-biases", tmp_path / "run.fs")
    assert all(name.endswith("weight") for name in scope.factors(store, ["a_0"])["a_0"])
    with pytest.raises(CoverageError, match=r"q_proj\.bias is no sum over the positions.*single linear map"):
        scope.factors(store, ["a_0"], parameters=["*layers.0.self_attn.q_proj.bias"])
    with pytest.raises(CoverageError, match="matches none"):
        scope.factors(store, ["a_0"], parameters=["nothing"])


def test_a_map_that_is_called_twice_is_refused(tmp_path: Path) -> None:
    """Its positions are not the sample's."""
    model: nn.Module = models.build(models.named("llama"))
    by_hand.call_twice(model.get_submodule("model.layers.0.mlp.up_proj"))
    scope = fs.wrap(model)
    store = collected(scope, "llama", tmp_path / "run.fs")
    with pytest.raises(CoverageError, match="called 2 times"):
        scope.factors(store, ["a_0"])
    assert scope.factors(store, ["a_0"], parameters=["*q_proj.weight"])["a_0"]


def test_factors_of_another_run_are_refused(tmp_path: Path) -> None:
    """Another sample, other weights: as for gradients."""
    model = models.build(models.named("llama"))
    scope = fs.wrap(model)
    store = collected(scope, "llama", tmp_path / "run.fs")
    with pytest.raises(KeyError, match="no sample 'a_7'"):
        scope.factors(store, ["a_7"])
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(2)
    with pytest.raises(FingerprintError, match="other weights"):
        scope.factors(store, ["a_0"])
