"""Gradient checkpointing: the same gradients, and what a checkpointed layer needs is made again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fisherscope as fs
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
