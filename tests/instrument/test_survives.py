"""What users do to models: autocast, hooks of other libraries, clipping, coupled layers, other losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherscope as fs
from fisherscope.errors import CoupledSamplesError, CoverageError, FingerprintError, NotStoredError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.objectives import CAUSAL_LM
from tests import models
from tests.instrument.test_objectives import CASES

EXACT = (fs.Fisher(), fs.SampleGradients(parameters="all", dtype="float32"))


@pytest.fixture
def model() -> nn.Module:
    return models.build(models.named("llama"))


def test_autocast_is_that_of_the_forward_pass(model: nn.Module, tmp_path: Path) -> None:
    """Under the user's autocast gradients are rounded as in a training step, and the products are not."""
    rows = models.rows(5)
    scope = fs.wrap(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        store = scope.collect({"a": rows}, tmp_path / "run.fs", extensions=EXACT, batch_size=3, quiet=True)
    exact = scope.collect({"a": rows}, tmp_path / "exact.fs", extensions=EXACT, batch_size=3, quiet=True)
    assert store.header.fingerprint["autocast"] == "bfloat16"
    assert exact.header.fingerprint["autocast"] is None
    for name in scope.parameters:
        found, expected = store.gradients("a", name), exact.gradients("a", name)
        error = float((found - expected).norm() / expected.norm())
        assert 1e-6 < error < 0.05, name
    with pytest.raises(FingerprintError, match="autocast"):
        scope.collect({"a": rows}, tmp_path / "run.fs", extensions=EXACT, batch_size=3, quiet=True)


FAMILIES = (
    *("llama", "gpt2", "qwen2", "qwen3-head-dim", "gemma", "mistral-head-dim"),
    *("phi3", "mixtral", "bloom", "opt", "gpt_neox", "falcon-mqa"),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_products_state_their_error(name: str, tmp_path: Path) -> None:
    """At most 2e-2 of each parameter's gradient, as the store says for each, and as it then is."""
    model, rows = models.build(models.named(name)), models.rows(4)
    scope = fs.wrap(model, parameters="all")
    store = scope.collect(
        {"a": rows}, tmp_path / "run.fs", extensions=EXACT, compute_dtype="bfloat16", batch_size=4, quiet=True
    )
    stated = dict(zip(store.parameters, store.constants()["compute/error"].tolist(), strict=True))
    expected = models.loop(model, rows)
    largest = max(float(g.norm()) for sample in expected for g in sample.values())
    for parameter in store.parameters:
        zero = torch.zeros(model.get_parameter(parameter).shape)
        g = torch.stack([sample.get(parameter, zero) for sample in expected])
        if float(g.norm()) < 1e-3 * largest:
            continue  # a true zero, such as of key biases, has no relative error
        assert stated[parameter] <= 2e-2, parameter
        assert float((store.gradients("a", parameter) - g).norm() / g.norm()) <= 2e-2, parameter
    assert max(stated.values()) > 1e-4


def test_hooks_that_change_gradients_are_refused(model: nn.Module, tmp_path: Path) -> None:
    """A clipped gradient is no gradient of the loss."""
    weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    handle = weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    scope = fs.wrap(model)
    with pytest.raises(
        CoverageError, match=r"hooks on model\.layers\.0\.self_attn\.q_proj\.weight .*clipping"
    ):
        scope.collect({"a": models.rows(3)}, tmp_path / "run.fs", quiet=True)
    handle.remove()
    scope.collect({"a": models.rows(3)}, tmp_path / "run.fs", quiet=True)


def test_optimisers_that_step_in_the_backward_pass_do_not(model: nn.Module, tmp_path: Path) -> None:
    """Hooks that wait for ``.grad`` stay where they are and are not called."""
    calls: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _parameter: calls.append(1))
    fs.wrap(model).collect({"a": models.rows(3)}, tmp_path / "run.fs", quiet=True)
    assert not calls
    CAUSAL_LM.losses(model, _batch()).sum().backward()
    assert len(calls) == len(list(model.parameters()))


def _batch() -> Batch:
    from fisherscope.instrument.batch import make_batch
    from fisherscope.instrument.data import prepare_task

    samples = prepare_task("a", models.rows(2))
    return make_batch("a", [0, 1], samples, pad_id=0, side="right", device=torch.device("cpu"))


def test_the_layer_that_couples_samples_is_named(model: nn.Module, tmp_path: Path) -> None:
    """Refused with its name; forced, it goes on and warns."""
    # as a batch normalisation in training mode does
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.register_forward_hook(lambda *args: args[2] - 0.5 * args[2].mean((0, 1), keepdim=True))
    scope = fs.wrap(model, parameters=["model.layers.0.self_attn.*"])
    rows = {"a": models.rows(6)}
    with pytest.raises(
        CoupledSamplesError, match=r"the first to give it another output is model\.layers\.1\.mlp\)"
    ):
        scope.collect(rows, tmp_path / "run.fs", batch_size=3, quiet=True)
    with pytest.warns(UserWarning, match="going on by force"):
        store = scope.collect(rows, tmp_path / "run.fs", batch_size=3, force=True, quiet=True)
    assert store.is_complete("a")
    alone = scope.collect(rows, tmp_path / "alone.fs", batch_size=1, quiet=True)
    assert alone.is_complete("a")


def test_a_loss_that_couples_samples_is_named(model: nn.Module, tmp_path: Path) -> None:
    """No layer's output changes, so it is the loss."""

    def coupled(model: nn.Module, batch: Batch) -> Tensor:
        losses = CAUSAL_LM.losses(model, batch)
        return losses * losses.mean()

    with pytest.raises(CoupledSamplesError, match="it is the loss that does so"):
        fs.wrap(model).collect({"a": models.rows(6)}, tmp_path / "run.fs", objective=coupled, quiet=True)


@pytest.mark.parametrize("case", ["llama", "bert-class-of-pairs", "t5"])
def test_gradients_can_be_had_again(case: str, tmp_path: Path) -> None:
    """From a store of group values: any samples, in any order, repeated ones too, as they are stored."""
    if case in CASES:
        _, build, make_rows = CASES[case]
        model, rows = build(), make_rows(6)
    else:
        model, rows = models.build(models.named(case)), models.rows(6)
    rows.append(rows[2])
    scope = fs.wrap(model)
    groups = scope.collect({"a": rows, "b_1": rows[:3]}, tmp_path / "groups.fs", extensions=(), quiet=True)
    full = scope.collect({"a": rows, "b_1": rows[:3]}, tmp_path / "full.fs", extensions=EXACT, quiet=True)
    found = scope.gradients(groups, ["a_6", "b_1_1", "a_0", "a_2"])
    for name in scope.parameters:
        a, b = full.gradients("a", name), full.gradients("b_1", name)
        expected = torch.stack([a[6], b[1], a[0], a[2]])
        floor = 1e-4 * float(max(full.gradients("a", n).abs().max() for n in scope.parameters))
        assert models.relative_error(found[name], expected, floor=floor) <= 1e-5, name
    only = scope.gradients(tmp_path / "groups.fs", ["a_1"], parameters=["*layer*0*"])
    assert set(only) < set(scope.parameters)


def test_gradients_of_images_need_the_images(tmp_path: Path) -> None:
    """A store does not keep pixels: they are given again, and checked."""
    _, build, make_rows = CASES["vit"]
    model, rows = build(), make_rows(4)
    scope = fs.wrap(model)
    store = scope.collect({"a": rows}, tmp_path / "run.fs", extensions=EXACT, quiet=True)
    with pytest.raises(NotStoredError, match="tasks="):
        scope.gradients(store, ["a_1"])
    found = scope.gradients(store, ["a_1"], tasks={"a": rows})
    for name in scope.parameters:
        assert models.relative_error(found[name][0], store.gradients("a", name)[1], floor=1e-2) <= 1e-5
    with pytest.raises(FingerprintError, match="does not hold a_1"):
        scope.gradients(store, ["a_1"], tasks={"a": rows[::-1]})


def test_gradients_of_another_run_are_refused(model: nn.Module, tmp_path: Path) -> None:
    """Another model, another loss, another sample."""
    rows = {"a": models.rows(3)}
    scope = fs.wrap(model)
    store = scope.collect(rows, tmp_path / "run.fs", extensions=(), quiet=True)
    with pytest.raises(KeyError, match="no sample 'a_3'"):
        scope.gradients(store, ["a_3"])

    def twice(model: nn.Module, batch: Batch) -> Any:
        return 2 * CAUSAL_LM.losses(model, batch)

    with pytest.raises(FingerprintError, match="objective"):
        scope.gradients(store, ["a_0"], objective=twice)
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(2)
    with pytest.raises(FingerprintError, match="other weights"):
        scope.gradients(store, ["a_0"])
