"""Which position carries a gradient, against outer products of single positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fisherscope as fs
from fisherscope.errors import CoverageError, Interrupted, NotStoredError
from fisherscope.instrument.extensions.positions import contributions
from fisherscope.layout import Partition
from fisherscope.linalg import Factored
from tests import models
from tests.instrument import by_hand
from tests.instrument.interrupting import interrupted_after

TOLERANCE = 1e-5


def _by_hand(factors: by_hand.Factors, *, transposed: bool, positions: int) -> tuple[Tensor, Tensor]:
    """Each position's gradient in the parameter's shape ``[positions, *shape]``, and their sum."""
    each = torch.stack([torch.outer(d, a) for a, d in zip(factors.a, factors.d, strict=True)])
    each = each.mT if transposed else each
    each = torch.unflatten(each, 0, (-1, positions)).sum(0)
    return each, each.sum(0)


@pytest.mark.parametrize(("name", "side"), by_hand.CASES)
def test_contributions_equal_products_of_single_positions(name: str, side: str, tmp_path: Path) -> None:
    """<g_t, g> of each position, for the whole matrix and every head, padded on either side."""
    data, loss = by_hand.data_of(name)
    model = models.build(models.named(name))
    scope = fs.wrap(model, models.PadsOnTheLeft() if side == "left" else None)
    extensions = (fs.Positions(parameters="all"),)
    store = scope.collect({"a": data}, tmp_path / "run.fs", extensions=extensions, batch_size=3, quiet=True)
    parameters = store.header.position_parameters
    assert len(parameters) >= 8
    paths = [parameter.removesuffix(".weight") for parameter in parameters]
    expected = by_hand.factors(model, paths, data, loss)
    for parameter, path in zip(parameters, paths, strict=True):
        found = store.position_contributions("a", parameter)
        blocks = [b for _, b in scope.layout.head_blocks() if b.weight.parameter == parameter]
        of_heads = {b.name: store.position_contributions("a", parameter, block=b.name) for b in blocks}
        for i, sample in enumerate(expected):
            each, g = _by_hand(sample[path], transposed=name == "gpt2", positions=len(sample[path].a))
            assert found[i].shape == (len(each),)
            scale = float(g.square().sum())
            assert models.relative_error(found[i], (each * g).sum((1, 2)), floor=scale) <= TOLERANCE
            assert float(found[i].sum()) == pytest.approx(scale, rel=1e-4)
            for block in blocks:
                assert of_heads[block.name][i].shape == (block.heads, len(each))
                for piece, values in zip(block.weight, of_heads[block.name][i], strict=True):
                    slices = (piece.take(each) * piece.take(g)).flatten(1).sum(1)
                    assert models.relative_error(values, slices, floor=scale) <= TOLERANCE


def test_they_add_up_to_the_stored_squares(tmp_path: Path) -> None:
    """Over positions: ||g||^2 of the matrix and of each head, as the group values have them."""
    scope = fs.wrap(models.build(models.named("qwen2")), parameters="attention")
    store = scope.collect(
        {"a": models.rows(6)}, tmp_path / "run.fs", extensions=("position_contributions",), quiet=True
    )
    values = store.group_values("a")
    table = store.groups("a")
    weights = table[table["part"].eq("weight") & table["kind"].isin(["parameter", "head"])]
    assert len(weights) == 2 * (4 + 4 + 2 + 2 + 4)  # weights, then heads of Q, K, V and O, of two layers
    for column, group in weights.iterrows():
        if group["kind"] == "parameter":
            sums = [c.sum() for c in store.position_contributions("a", group["parameter"])]
        else:
            found = store.position_contributions("a", group["parameter"], block=group["block"])
            sums = [c[group["index"]].sum() for c in found]
        expected = torch.tensor(values["square"].values[:, column])
        assert models.relative_error(torch.stack(sums), expected) <= TOLERANCE


def test_samples_are_chosen_in_the_order_asked(tmp_path: Path) -> None:
    """A list of positions, out of order and repeated, in a store whose batches are sorted by length."""
    scope = fs.wrap(models.build(models.named("llama")))
    data = models.rows(6)
    store = scope.collect(
        {"a": data}, tmp_path / "run.fs", extensions=(fs.Positions(),), batch_size=2, quiet=True
    )
    name = "model.layers.1.self_attn.v_proj.weight"
    every = store.position_contributions("a", name)
    assert [len(c) for c in every] == [len(row["input_ids"]) for row in data]
    for chosen in ([4, 0, 0], slice(None, None, -2), []):
        places = torch.arange(6).numpy()[chosen].tolist()
        found = store.position_contributions("a", name, chosen)
        assert len(found) == len(places)
        assert all(torch.equal(c, every[place]) for c, place in zip(found, places, strict=True))


@pytest.mark.parametrize("shape", [(3, 4), (40, 5), (5, 40), (40, 50)])
def test_both_ways_of_adding_up_agree(shape: tuple[int, int]) -> None:
    """Through the Gram matrix of positions where matrices are large, through g where they are small."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    gradient = Factored(
        torch.randn(2, 9, rows, generator=generator), torch.randn(2, 9, columns, generator=generator)
    )
    axes = [Partition.regular("w", shape, 0, rows, 1), Partition.regular("w", shape, 1, columns, 1)]
    found = contributions(gradient, [None, *axes])
    each = torch.einsum("ntr,ntc->ntrc", gradient.left.double(), gradient.right.double())
    products = each * each.sum(1, keepdim=True)
    expected = torch.cat([products.sum((2, 3)).unsqueeze(2), products.sum(3), products.sum(2)], 2)
    assert models.relative_error(found, expected) <= TOLERANCE


def test_a_map_that_is_called_twice(tmp_path: Path) -> None:
    """A position's contribution is that of both uses together."""
    model = models.build(models.named("llama"))
    path = "model.layers.0.mlp.down_proj"
    by_hand.call_twice(model.get_submodule(path))
    data = models.rows(5)
    store = fs.wrap(model, models.PadsOnTheLeft()).collect(
        {"a": data}, tmp_path / "run.fs", extensions=(fs.Positions([f"{path}.*"]),), batch_size=2, quiet=True
    )
    assert store.header.position_parameters == (f"{path}.weight",)
    expected = by_hand.factors(model, [path], data, by_hand.causal)
    found = store.position_contributions("a", f"{path}.weight")
    for row, sample, values in zip(data, expected, found, strict=True):
        each, g = _by_hand(sample[path], transposed=False, positions=len(row["input_ids"]))
        assert models.relative_error(values, (each * g).sum((1, 2))) <= TOLERANCE


def test_a_weight_that_the_loss_does_not_depend_on(tmp_path: Path) -> None:
    """Nothing contributes to a gradient of zero: zeros, one per position."""
    model = models.build(models.named("llama"))
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    handle = down.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    name = "model.layers.1.mlp.up_proj.weight"
    store = fs.wrap(model, parameters=[name]).collect(
        {"a": models.rows(3)}, tmp_path / "run.fs", extensions=(fs.Positions([name]),), quiet=True
    )
    handle.remove()
    assert [float(c.abs().sum()) for c in store.position_contributions("a", name)] == [0.0] * 3


def test_what_has_no_positions_is_refused(tmp_path: Path) -> None:
    """A router that is no linear map is refused by name, with the way out, and leaves nothing behind."""
    scope = fs.wrap(models.build(models.named("mixtral")), parameters="all")
    with pytest.raises(CoverageError, match=r"mlp\.gate\.weight: not the weight of .*parameters=\[\.\.\.\]"):
        scope.collect(
            {"a": models.rows(3)}, tmp_path / "run.fs", extensions=(fs.Positions(["*gate*"]),), quiet=True
        )
    assert not (tmp_path / "run.fs").exists()
    with pytest.raises(CoverageError, match="matches no instrumented weight"):
        scope.collect({"a": models.rows(3)}, tmp_path / "no.fs", extensions=(fs.Positions(["*.bias"]),))
    with pytest.raises(ValueError, match="use 'attention', 'all'"):
        fs.Positions(parameters="linear")


def test_what_to_collect(tmp_path: Path) -> None:
    """What was not collected, no parameter, and no block are told apart."""
    scope = fs.wrap(models.build(models.named("gpt2")))
    store = scope.collect(
        {"a": models.rows(3)}, tmp_path / "run.fs", extensions=(fs.Positions(),), quiet=True
    )
    with pytest.raises(NotStoredError, match=r"Positions\(parameters=\[\.\.\., 'transformer\.h\.0\.mlp"):
        store.position_contributions("a", "transformer.h.0.mlp.c_fc.weight")
    with pytest.raises(KeyError, match="no parameter 'q'"):
        store.position_contributions("a", "q")
    with pytest.raises(KeyError, match=r"\['Q', 'K', 'V'\]"):
        store.position_contributions("a", "transformer.h.0.attn.c_attn.weight", block="O")


def test_a_resumed_run_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the middle of a segment and run again: the values of an uninterrupted run."""

    def collect(out: Path) -> fs.ContributionStore:
        scope = fs.wrap(models.build(models.named("gpt2")), models.PadsOnTheLeft())
        extensions = (fs.Positions("all"),)
        return scope.collect({"a": models.rows(13)}, out, extensions=extensions, batch_size=2, quiet=True)

    with interrupted_after(3, monkeypatch), pytest.raises(Interrupted):
        collect(tmp_path / "run.fs")
    name = "transformer.h.1.attn.c_attn.weight"
    assert len(fs.open_store(tmp_path / "run.fs").position_contributions("a", name)) == 6
    resumed, whole = collect(tmp_path / "run.fs"), collect(tmp_path / "whole.fs")
    for parameter in whole.header.position_parameters:
        pairs = zip(
            resumed.position_contributions("a", parameter),
            whole.position_contributions("a", parameter),
            strict=True,
        )
        assert all(torch.equal(one, other) for one, other in pairs)
