"""Every layer rule, for shapes that hypothesis draws, against one backward pass per sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from fisherscope.instrument.rules import LayerCall, find_rule
from fisherscope.linalg import PerSampleGradient

sizes = st.integers(1, 7)
few = settings(max_examples=25, deadline=None, derandomize=True)


def per_sample(module: nn.Module, inputs: Tensor, weights: Tensor) -> list[dict[str, Tensor]]:
    """Gradients of ``sum(weights * output)`` of each sample alone: one forward and backward pass each."""
    found = []
    for i in range(len(inputs)):
        module.zero_grad()
        (module(inputs[i : i + 1]) * weights[i : i + 1]).sum().backward()
        found.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
    return found


def by_rule(module: nn.Module, inputs: Tensor, weights: Tensor, images: bool) -> dict[str, PerSampleGradient]:
    """What the rule makes of one call for all samples; with images, those that the engine hands on."""
    rule = find_rule(module)
    assert rule is not None
    given = inputs.clone().requires_grad_(inputs.is_floating_point())
    outputs = module(given)
    (outputs * weights).sum().backward()
    call = LayerCall(
        inputs,
        weights,
        outputs=outputs.detach() if images else None,
        input_gradient=given.grad if images and given.requires_grad else None,
    )
    wanted = frozenset(name for name, _ in module.named_parameters())
    assert wanted <= set(rule.handles)
    return rule.gradients(module, call, wanted)


def compare(module: nn.Module, inputs: Tensor, *, images: bool = True) -> None:
    """Gradients, their inner products with the parameter, and every one of the parameters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
        shape = module(inputs).shape
    weights = torch.randn(shape)
    expected = per_sample(module, inputs, weights)
    found = by_rule(module, inputs, weights, images)
    assert set(found) == {name for name, _ in module.named_parameters()}
    for name, gradient in found.items():
        g = torch.stack([sample[name] for sample in expected])
        torch.testing.assert_close(gradient.dense(), g, rtol=1e-5, atol=1e-5 * (1 + float(g.abs().max())))
        theta = module.get_parameter(name).detach()
        dots = (g * theta).flatten(1).sum(1, keepdim=True)
        scale = 1 + float((g * theta).abs().sum())
        torch.testing.assert_close(gradient.dots(theta, [None])[0], dots, rtol=1e-4, atol=1e-5 * scale)


@few
@given(n=sizes, t=sizes, inputs=sizes, outputs=sizes, bias=st.booleans(), axes=st.sampled_from([2, 3, 4]))
def test_linear(n: int, t: int, inputs: int, outputs: int, bias: bool, axes: int) -> None:
    """With and without bias, for ``[n, features]``, ``[n, T, features]`` and one more axis."""
    torch.manual_seed(0)
    shape = (n, *(t, 2)[: axes - 2], inputs)
    compare(nn.Linear(inputs, outputs, bias=bias), torch.randn(shape))


@few
@given(n=sizes, t=sizes, inputs=sizes, outputs=sizes, images=st.booleans())
def test_conv1d(n: int, t: int, inputs: int, outputs: int, images: bool) -> None:
    """transformers' own, whose weight is ``[in, out]``."""
    torch.manual_seed(0)
    compare(Conv1D(outputs, inputs), torch.randn(n, t, inputs), images=images)


@few
@given(n=sizes, t=sizes, rows=st.integers(2, 9), width=sizes, padding=st.sampled_from([None, 0, 1]))
def test_embedding(n: int, t: int, rows: int, width: int, padding: int | None) -> None:
    """Ids that repeat within a sample; the row of the padding index has no gradient."""
    torch.manual_seed(0)
    module = nn.Embedding(rows, width, padding_idx=padding)
    ids = torch.randint(0, rows, (n, t))
    weights = torch.randn(n, t, width)
    expected = torch.stack([sample["weight"] for sample in per_sample(module, ids, weights)])
    rule = find_rule(module)
    assert rule is not None
    found = rule.gradients(module, LayerCall(ids, weights), frozenset({"weight"}))["weight"]
    torch.testing.assert_close(found.dense(), expected)
    square = found.norms([None])[0].squeeze(1)
    torch.testing.assert_close(square, expected.square().flatten(1).sum(1), rtol=1e-4, atol=1e-5)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "LayerNorm": nn.LayerNorm,
    "LayerNorm without bias": lambda width: nn.LayerNorm(width, bias=False),
    "RMSNorm": nn.RMSNorm,
    "LlamaRMSNorm": LlamaRMSNorm,
    "GemmaRMSNorm (1 + weight)": GemmaRMSNorm,
}


@pytest.mark.parametrize("name", NORMS)
@few
@given(n=sizes, t=sizes, heads=st.integers(0, 3), width=st.integers(2, 7))
def test_norms(name: str, n: int, t: int, heads: int, width: int) -> None:
    """Of whole hidden states, and of every head's queries or keys (one more axis)."""
    torch.manual_seed(0)
    shape = (n, t, heads, width) if heads else (n, t, width)
    compare(NORMS[name](width), torch.randn(shape))


@few
@given(
    n=sizes,
    channels=st.integers(1, 3),
    outputs=sizes,
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    bias=st.booleans(),
)
def test_conv2d(n: int, channels: int, outputs: int, kernel: int, stride: int, bias: bool) -> None:
    """Patch embeddings, and patches that overlap or leave gaps."""
    torch.manual_seed(0)
    compare(nn.Conv2d(channels, outputs, kernel, stride=stride, bias=bias), torch.randn(n, channels, 7, 6))


def test_what_no_rule_applies_to() -> None:
    """A subclass that computes something else has no rule; it is run again sample by sample instead."""

    class Doubled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    assert find_rule(nn.Linear(2, 3)) is not None
    assert find_rule(Doubled(2, 3)) is None
    assert find_rule(nn.GRU(2, 3)) is None
