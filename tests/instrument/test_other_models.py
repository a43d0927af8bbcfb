"""Encoders, and encoders with decoders, under losses of one's own, against the literal loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fisherscope as fs
from tests import models

TOLERANCE = 1e-5
EXACT = (fs.Fisher(), fs.SampleGradients(parameters="all", dtype="float32"))


def masked_loss(model: Any, batch: Any) -> Tensor:
    """Summed loss of the labelled positions of an encoder, ``[n]``."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return _summed(logits, batch.labels)


def seq2seq_loss(model: Any, batch: Any) -> Tensor:
    """Summed loss of the target, which is the source again, ``[n]``."""
    start = torch.zeros_like(batch.input_ids[:, :1])
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        decoder_input_ids=torch.cat([start, batch.input_ids[:, :-1]], 1),
    ).logits
    return _summed(logits, batch.labels)


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)


@pytest.mark.parametrize(
    ("name", "loss"),
    [("bert", masked_loss), ("roberta", masked_loss), ("t5", seq2seq_loss), ("t5-gated", seq2seq_loss)],
)
def test_gradients_equal_the_loop(name: str, loss: Callable[[Any, Any], Tensor], tmp_path: Path) -> None:
    """Every parameter of every stack, with a loss of one's own; and head slices cut by hand."""
    if name.startswith("t5"):
        models.skip_where_old("T5's encoder gives its table of positions no axis over samples")
    model = models.build(models.named(name))
    data = models.rows(5)
    scope = fs.wrap(model, parameters="all")
    assert scope.coverage()["covered"].all()
    store = scope.collect(
        {"a": data}, tmp_path / "run.fs", extensions=EXACT, objective=loss, batch_size=3, quiet=True
    )
    expected = [_alone(model, row, loss) for row in data]
    for parameter in scope.parameters:
        found = store.gradients("a", parameter)
        by_loop = torch.stack([sample[parameter] for sample in expected])
        # a key bias moves all scores of a query alike, so its gradient is rounding; so is T5's first step
        floor = 1e-3 * max(float(g.abs().max()) for sample in expected for g in sample.values())
        assert models.relative_error(found, by_loop, floor=floor) <= TOLERANCE, parameter
    for attention in scope.layout.attention:
        for block in ("Q", "K", "V", "O"):
            weight = attention.block(block).weight
            width = weight.shape[weight.axis] // 4
            by_loop = torch.stack([sample[weight.parameter] for sample in expected])
            by_hand = by_loop.narrow(weight.axis + 1, 2 * width, width).flatten(1)
            found = store.slice("a", layer=attention.layer, block=block, head=2, stack=attention.stack)
            assert models.relative_error(found, by_hand, floor=1e-4) <= TOLERANCE


def _alone(
    model: torch.nn.Module, row: dict[str, Any], loss: Callable[[Any, Any], Tensor]
) -> dict[str, Tensor]:
    class One:
        input_ids = torch.tensor([row["input_ids"]])
        attention_mask = torch.ones_like(input_ids)
        labels = torch.tensor([row["labels"]])

    model.zero_grad()
    loss(model, One).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


WINDOWED = {
    "swin": ("SwinForImageClassification", "SwinConfig"),
    # its position biases are made by a small network that all samples share
    "swinv2": ("Swinv2ForImageClassification", "Swinv2Config"),
}


@pytest.mark.filterwarnings("ignore:no adapter is registered")
@pytest.mark.parametrize("name", WINDOWED)
def test_windows_and_biases_of_all_samples(name: str, tmp_path: Path) -> None:
    """Samples lie along one axis with their windows, and share what gives positions: as the loop has it."""
    import transformers

    classes = [getattr(transformers, part) for part in WINDOWED[name]]
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "num_labels": 3}
    model = classes[0](classes[1](image_size=32, patch_size=4, **sizes)).eval()
    generator = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "label": i % 3} for i in range(4)]
    scope = fs.wrap(model, parameters="all")
    assert scope.coverage()["covered"].all()
    store = scope.collect({"a": data}, tmp_path / "run.fs", extensions=EXACT, batch_size=2, quiet=True)
    names = [name for name, _ in model.named_parameters()]
    for row, sample in enumerate(data):
        logits = model(pixel_values=sample["pixel_values"][None]).logits
        loss = F.cross_entropy(logits, torch.tensor([sample["label"]]))
        expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        largest = max(float(g.abs().max()) for g in expected if g is not None)
        for parameter, g in zip(names, expected, strict=True):
            found = store.gradients("a", parameter, samples=[row])[0]
            wanted = torch.zeros_like(found) if g is None else g
            size = max(float(wanted.abs().max()), 1e-3 * largest)
            assert float((found - wanted).abs().max()) < 1e-5 * size, parameter


def gated() -> Any:
    """A tiny model whose norms are given a gate beside what they scale."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "pad_token_id": 0}
    config = transformers.Mamba2Config(
        **sizes, state_size=8, num_heads=4, head_dim=16, n_groups=1, expand=2, chunk_size=8
    )
    model = transformers.Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_norm_that_is_given_a_gate(tmp_path: Path) -> None:
    """A rule that knows one input does not serve a layer with two; on demand and collected, as the loop."""
    model, data = gated(), models.rows(4)
    scope = fs.wrap(model, parameters=["*.norm.weight"])
    store = scope.collect({"a": data}, tmp_path / "run.fs", extensions=EXACT, batch_size=2, quiet=True)
    expected = models.loop(model, data)
    again = scope.gradients(store, [f"a_{row}" for row in range(4)])
    for parameter in scope.parameters:
        g = torch.stack([sample[parameter] for sample in expected])
        for found in (store.gradients("a", parameter), again[parameter]):
            assert float((found - g).abs().max()) < 1e-5 * float(g.abs().max()), parameter
