"""A batch is proved by an ordinary backward pass: what is wrong is caught, and what is right passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fisherscope as fs
from fisherscope.errors import CoverageError
from fisherscope.instrument import hooks, replay
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.forwards import around
from fisherscope.instrument.objectives import CAUSAL_LM
from fisherscope.instrument.rules import LayerCall
from fisherscope.instrument.uses import Use
from tests import models

DTYPES = (torch.float32, torch.bfloat16)
V = "model.layers.0.self_attn.v_proj"


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    return models.build(models.named("llama"), layers=1).to(dtype)


def collect(model: nn.Module, out: Path, **options: Any) -> fs.store.ContributionStore:
    given = {"batch_size": 4, "quiet": True, "extensions": ["fisher"], **options}
    return fs.wrap(model, parameters="all").collect({"a": models.rows(8)}, out, **given)


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[LayerCall], LayerCall]) -> None:
    """Have the rules see something else than what flows, in every layer and every batch."""
    own = Use.call

    def call(self: Use, *args: Any) -> LayerCall:
        return change(own(self, *args))

    monkeypatch.setattr(Use, "call", call)


def swapped(call: LayerCall) -> LayerCall:
    """The first two samples in each other's place."""
    if len(call.inputs) < 2:
        return call
    order = [1, 0, *range(2, len(call.inputs))]
    return replace(call, inputs=call.inputs[order], output_gradient=call.output_gradient[order])


def dropped(call: LayerCall) -> LayerCall:
    """One position of one sample is left out."""
    gradient = call.output_gradient.clone()
    gradient[0, 1] = 0
    return replace(call, output_gradient=gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [swapped, dropped])
def test_samples_exchanged_and_positions_dropped_are_caught(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    change: Callable[[LayerCall], LayerCall],
    dtype: torch.dtype,
) -> None:
    """In either dtype; samples, parameter and what to do are named, and nothing of the batch is committed."""
    monkeypatch.setattr("fisherscope.instrument.collection.check_samples", lambda *_: None)
    spoil(monkeypatch, change)
    with pytest.raises(CoverageError, match=r"a_0.* with respect to .* are not what autograd finds") as error:
        collect(llama(dtype), tmp_path / "run.fs")
    assert "leave" in str(error.value).lower()
    assert not (tmp_path / "run.fs").exists()


def test_a_quiet_sample_that_is_scaled_is_caught_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A gradient 10 % too large of a sample that is a thousand times quieter than the others."""

    def quiet(model: nn.Module, batch: Batch) -> Tensor:
        losses = CAUSAL_LM.losses(model, batch)
        return losses * torch.tensor([1e-3 if row == 2 else 1.0 for row in batch.rows])

    rows = [{"input_ids": [5, 7, 11 + k, 13, 17]} for k in range(4)]
    scope = fs.wrap(llama())
    given = {"objective": quiet, "batch_size": 4, "quiet": True, "extensions": ["fisher"]}
    scope.collect({"a": rows}, tmp_path / "right.fs", **given)
    monkeypatch.setattr("fisherscope.instrument.collection.check_samples", lambda *_: None)

    def louder(call: LayerCall) -> LayerCall:
        gradient = call.output_gradient.clone()
        if len(gradient) > 2:
            gradient[2] *= 1.1
        return replace(call, output_gradient=gradient)

    spoil(monkeypatch, louder)
    with pytest.raises(CoverageError, match=r"the gradients of a_2 with respect to"):
        scope.collect({"a": rows}, tmp_path / "run.fs", **given)


def behind(victim: nn.Module) -> Callable[..., Any]:
    """Where a hook of ours stood once: it sees what other people's hooks have made of the output."""

    @contextmanager
    def stand(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
        if module is not victim:
            with around(module, call):
                yield
            return

        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return call(lambda *_args, **_kwargs: output, args, kwargs)

        handle = module.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    return stand


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_standing_behind_a_foreign_hook_is_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype
) -> None:
    """A hook that damps some positions, and ours forced to where it takes their output for the layer's."""

    def damp(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 2:] *= 0.1
        return output

    model = llama(dtype)
    model.get_submodule(V).register_forward_hook(damp)
    collect(model, tmp_path / "right.fs")
    monkeypatch.setattr(hooks, "around", behind(model.get_submodule(V)))
    with pytest.raises(CoverageError, match=rf"{V}\.weight are not what autograd finds.*1 hooks on {V}"):
        collect(model, tmp_path / "run.fs")


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(32, generator=torch.Generator().manual_seed(0)) + 0.5)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return torch.tanh(x * self.gain + table * self.gain)


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.first = inner, Gain()

    def forward(self, x: Tensor) -> Tensor:
        table = torch.arange(x.shape[1]).to(x)[:, None].expand(-1, 32) / 7
        return self.inner(self.first(x, table))


def home_made(dtype: torch.dtype = torch.float32) -> Any:
    model: Any = llama(dtype)
    model.model.layers[0].mlp = Block(model.model.layers[0].mlp).to(dtype)
    model.config.model_type = "home_made"
    return model


GAIN = "model.layers.0.mlp.first.gain"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_axis_over_samples_is_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype
) -> None:
    """A table over positions, as long as the batch, cut into samples; by the proof alone."""
    rows = [{"input_ids": [5, 7, 11, 13 + k]} for k in range(4)]
    scope = fs.wrap(home_made(dtype), parameters=[GAIN, "model.layers.*.self_attn.*"])
    given = {"batch_size": 4, "quiet": True, "extensions": ["fisher"]}
    scope.collect({"a": rows}, tmp_path / "right.fs", **given)
    monkeypatch.setattr("fisherscope.instrument.collection.check_samples", lambda *_: None)
    monkeypatch.setattr("fisherscope.instrument.collection.Collection._probe", lambda _self: {})
    monkeypatch.setattr(replay, "all_agree", lambda *_: True)
    monkeypatch.setattr(replay.Replay, "_choices", lambda self, place, tensor, known: [0])
    with pytest.raises(CoverageError, match=GAIN):
        scope.collect({"a": rows}, tmp_path / "run.fs", **given)


@pytest.mark.parametrize(("n", "length"), [(3, 6), (6, 6), (8, 8), (2, 12), (12, 6)])
def test_what_all_samples_share_is_not_cut(tmp_path: Path, n: int, length: int) -> None:
    """Whatever the number of samples and positions, the gain's F is that of the loop over samples."""
    model = home_made()
    rows = [{"input_ids": [(3 * k + j) % 50 + 5 for j in range(length)]} for k in range(n)]
    store = fs.wrap(model, parameters=[GAIN]).collect(
        {"a": rows}, tmp_path / "run.fs", quiet=True, batch_size=n, extensions=["fisher"]
    )
    assert_is_the_loop(model, rows, store, GAIN)


def assert_is_the_loop(model: nn.Module, rows: Any, store: fs.store.ContributionStore, name: str) -> None:
    """F of one parameter equals the literal loop, of the model with whatever hooks it has."""
    expected = torch.zeros((), dtype=torch.float64)
    parameter = model.get_parameter(name)
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor(row.get("labels", row["input_ids"]))[1:]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, [parameter])
        expected = expected + gradient.double() ** 2 / int((labels != -100).sum()) / len(rows)
    found = torch.as_tensor(store.fisher("a", name)).double()
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_sampled_labels_and_single_tokens_are_proved_as_well(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each label source has a backward pass of its own; one of its passes is compared."""
    sources = (fs.Fisher(labels=("data", "sampled"), draws=2), fs.ExactPerToken())
    collect(llama(), tmp_path / "right.fs", extensions=sources)
    own = hooks.GradientTap.backward
    passes = []

    def backward(self: hooks.GradientTap, loss: Tensor, *, keep_graph: bool = False) -> None:
        passes.append(keep_graph)
        # only the first pass of a batch is that of the data's labels
        own(self, loss if keep_graph and passes.count(True) % 3 == 1 else 1.05 * loss, keep_graph=keep_graph)

    monkeypatch.setattr("fisherscope.instrument.collection.check_samples", lambda *_: None)
    monkeypatch.setattr(hooks.GradientTap, "backward", backward)
    with pytest.raises(CoverageError, match="not what autograd finds"):
        collect(llama(), tmp_path / "run.fs", extensions=sources)


FAMILIES = (
    *("llama", "gpt2", "qwen2-tied-mqa", "opt", "bloom"),
    *("gemma", "gpt_neox", "falcon-mqa", "phi3", "mixtral"),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-tied-mqa", "mixtral"])
def test_clean_batches_pass(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Every batch of several families, all parameters, tied and replayed ones among them."""
    model = models.build(models.named(name), layers=1).to(dtype)
    store = collect(model, tmp_path / "run.fs", check="every")
    (found,) = store.evidence("proof")
    assert found["batches"] == found["proved"] == 2
    assert 0 < found["largest_deviation"] < found["tolerance"] * 3
    assert found["tolerance"] < found["smallest_error_seen"] < 200 * found["tolerance"]
    assert found["check"] == "every"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_five_hundred_clean_batches_pass(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """25 batches each of ten families in both dtypes: no false alarm."""
    model = models.build(models.named(name), layers=1).to(dtype)
    store = fs.wrap(model, parameters="all").collect(
        {"a": models.rows(100)},
        tmp_path / "run.fs",
        batch_size=4,
        check="every",
        extensions=[fs.Fisher(shape="groups")],
        quiet=True,
    )
    assert store.proofs()["a"]["proved"] == 25


@pytest.mark.parametrize(("check", "proved"), [("auto", 2), ("first", 1), ("every", 4), ("off", 0)])
def test_which_batches_are_proved(tmp_path: Path, check: Any, proved: int) -> None:
    """The first, and of each structure the first: here the last batch has one sample."""
    rows = [{"input_ids": [5, 7, 11, 13 + k]} for k in range(7)]
    store = fs.wrap(llama()).collect(
        {"a": rows}, tmp_path / "run.fs", quiet=True, batch_size=2, check=check, extensions=["fisher"]
    )
    (found,) = store.evidence("proof")
    assert (found["batches"], found["proved"]) == (4, proved)


def test_check_is_one_of_four_words(tmp_path: Path) -> None:
    """Anything else is refused, and what there is is named."""
    with pytest.raises(ValueError, match=r"check='yes': use one of 'auto', 'every', 'first', 'off'"):
        collect(llama(), tmp_path / "run.fs", check="yes")


def test_a_proof_is_no_part_of_the_identity(tmp_path: Path) -> None:
    """A run that proves nothing goes on with the store of one that did, to the bit."""
    scope, given = fs.wrap(llama()), {"batch_size": 2, "quiet": True, "extensions": ["fisher"]}
    rows = models.rows(8)
    scope.collect({"a": rows[:4]}, tmp_path / "run.fs", check="every", **given)
    grown = scope.collect({"a": rows}, tmp_path / "run.fs", check="off", **given)
    other = scope.collect({"a": rows[:4]}, tmp_path / "other.fs", check="off", **given)
    other = scope.collect({"a": rows}, tmp_path / "other.fs", check="every", **given)
    for name in grown.parameters:
        assert torch.equal(torch.as_tensor(grown.fisher("a", name)), torch.as_tensor(other.fisher("a", name)))
    assert [found["proved"] for found in grown.evidence("proof")] == [2, 0]
    found = grown.proofs()["a"]
    assert (found["batches"], found["proved"]) == (4, 2)
    assert "2 of 4 batches were compared with an ordinary backward pass" in found["in_words"]
    assert "wrong targets" in found["cannot_see"]


def test_forced_the_run_goes_on_with_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where samples influence each other."""
    monkeypatch.setattr("fisherscope.instrument.collection.check_samples", lambda *_: None)
    spoil(monkeypatch, dropped)
    with pytest.warns(UserWarning, match="going on by force: the gradients of"):
        store = collect(llama(), tmp_path / "run.fs", force=True)
    assert store.is_complete("a")


def test_a_sparse_gradient_is_one_like_any_other(tmp_path: Path) -> None:
    """``nn.Embedding(sparse=True)`` with all parameters, against the loop."""
    model: Any = llama()
    model.model.embed_tokens.sparse = True
    rows = models.rows(6)
    store = fs.wrap(model, parameters="all").collect({"a": rows}, tmp_path / "run.fs", quiet=True)
    model.model.embed_tokens.sparse = False
    assert_is_the_loop(model, rows, store, "model.embed_tokens.weight")


def test_autocast_inside_of_forward_is_judged_as_what_it_is(tmp_path: Path) -> None:
    """Weights in float32 and products in bfloat16: the tolerance is that of the products."""

    class Inside(type(llama())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(*args, **kwargs)

    model = llama()
    model.__class__ = Inside
    (found,) = collect(model, tmp_path / "run.fs", check="every").evidence("proof")
    assert found["dtype"] == "bfloat16"
    assert found["proved"] == 2


def test_a_reference_that_is_not_finite_is_no_agreement() -> None:
    """NaN is compared with nothing: it does not pass for a deviation of 0."""
    from fisherscope.instrument.checking.proof import _largest

    scale = torch.ones(2, dtype=torch.float64)
    assert _largest(torch.tensor([0.1, torch.nan], dtype=torch.float64), scale) == torch.inf
    assert _largest(torch.tensor([], dtype=torch.float64), scale[:0]) == 0.0
    assert _largest(torch.zeros(2, dtype=torch.float64), 0 * scale) == 0.0
    assert _largest(torch.ones(2, dtype=torch.float64), 0 * scale) == torch.inf


def test_float16_with_small_gradients_is_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights that would leave the range of float16 are not used: clean runs pass, a turned sign does not."""
    torch.manual_seed(0)
    model = llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.004)
    model = model.half()
    scope = fs.wrap(model, parameters=["*k_proj.weight"])
    given = {"batch_size": 4, "quiet": True, "extensions": ["fisher"], "check": "every"}
    assert scope.collect({"a": models.rows(8)}, tmp_path / "right.fs", **given).is_complete("a")
    monkeypatch.setattr("fisherscope.instrument.collection.check_samples", lambda *_: None)

    def turned(call: LayerCall) -> LayerCall:
        gradient = call.output_gradient.clone()
        gradient[0] *= -1
        return replace(call, output_gradient=gradient)

    spoil(monkeypatch, turned)
    with pytest.raises(CoverageError, match="not what autograd finds"):
        scope.collect({"a": models.rows(8)}, tmp_path / "run.fs", **given)


def test_gradients_on_demand_are_proved_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They may be of parameters of which the store knows nothing."""
    model = llama()
    few = fs.wrap(model, parameters=["*.q_proj.weight"])
    store = few.collect({"a": models.rows(6)}, tmp_path / "run.fs", quiet=True, extensions=["fisher"])
    scope = fs.wrap(model, parameters="all")
    scope.gradients(store, ["a_1", "a_2"])
    monkeypatch.setattr("fisherscope.instrument.on_demand.check_model", lambda *_: None)
    spoil(monkeypatch, dropped)
    with pytest.raises(CoverageError, match="not what autograd finds"):
        scope.gradients(store, ["a_1", "a_2"])
