"""Gradient checkpointing: the same gradients, and what a checkpointed layer needs is made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fisherscope as fs
from fisherscope.instrument.objectives import CAUSAL_LM
from tests import models

EXACT = (fs.Fisher(), fs.SampleGradients(parameters="all", dtype="float32"))
FAMILIES = ("llama", "gpt2", "opt", "mixtral", "qwen3-head-dim")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointed_models_equal_the_loop(name: str, reentrant: bool, tmp_path: Path) -> None:
    """Both kinds of checkpoints, on every parameter; the layers run twice, and are left as they were."""
    model = models.build(models.named(name))
    data = models.rows(5)
    expected = models.loop(model, data)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    layer = next(
        m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and list(m.parameters())
    )
    calls = []
    counter = next(layer.children()).register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    store = fs.wrap(model, parameters="all").collect(
        {"a": data}, tmp_path / "run.fs", extensions=EXACT, batch_size=5, quiet=True
    )
    counter.remove()
    assert calls.count(True) >= 2 if not reentrant else {True, False} <= set(calls)
    assert "forward" not in vars(layer)
    assert layer.gradient_checkpointing
    for parameter in store.parameters:
        g = torch.stack([sample[parameter] for sample in expected])
        floor = 1e-3 * max(float(v.abs().max()) for sample in expected for v in sample.values())
        assert models.relative_error(store.gradients("a", parameter), g, floor=floor) <= 1e-5, parameter


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_module_that_is_used_inside_and_outside(reentrant: bool, tmp_path: Path) -> None:
    """A checkpointed layer's MLP is called once more behind the layers: both uses count, and each once."""
    model: Any = models.build(models.named("llama"), layers=1)
    mlp = model.model.layers[0].mlp
    model.model.norm.register_forward_hook(lambda _module, _args, output: output + mlp(output))
    _equals_the_loop(model, reentrant, tmp_path, "auto")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_an_objective_that_runs_the_model_twice(reentrant: bool, tmp_path: Path) -> None:
    """A pass without gradients beside the one that counts, as of a reference model."""

    def with_reference(model: Any, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            reference = CAUSAL_LM.losses(model, batch)
        return CAUSAL_LM.losses(model, batch) + 0.0 * reference

    model = models.build(models.named("llama"), layers=1)
    _equals_the_loop(model, reentrant, tmp_path, with_reference)


def _equals_the_loop(model: Any, reentrant: bool, tmp_path: Path, objective: Any) -> None:
    data = models.rows(5)
    expected = models.loop(model, data)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for check in ("every", "off"):
        store = fs.wrap(model, parameters="linear").collect(
            {"a": data},
            tmp_path / f"{check}.fs",
            extensions=EXACT,
            objective=objective,
            check=check,  # type: ignore[arg-type]
            quiet=True,
        )
        for parameter in store.parameters:
            g = torch.stack([sample[parameter] for sample in expected])
            assert models.relative_error(store.gradients("a", parameter), g) <= 1e-5, parameter
