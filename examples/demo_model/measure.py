"""What is recorded beside the weights: accuracies, and how the gradients of each task are spread.

The Fisher information here is the literal definition, one backward pass per sample, and shares no code with
the package: it stands beside the package's own numbers as an independent witness.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tasks import Sample
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

ATTENTION = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
MLP = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def encode(tokenizer: Qwen2Tokenizer, samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Returns token ids and labels, right-padded; labels are -100 except on the completions.

    Both have the shape (samples, longest) and dtype int64.
    """
    texts = [sample.prompt + sample.completion for sample in samples]
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    labels = torch.full_like(ids, -100)
    for row, sample in enumerate(samples):
        start, end = len(sample.prompt), len(texts[row])
        labels[row, start:end] = ids[row, start:end]
    return ids, labels


@torch.no_grad()
def accuracy(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, samples: list[Sample]) -> float:
    """Returns the share of samples whose whole completion greedy decoding reproduces exactly.

    Greedy decoding gives the completion if and only if each of its tokens is the most likely one after the
    prompt and the true tokens before it; so one forward pass decides.
    """
    correct = 0
    for start in range(0, len(samples), 256):
        ids, labels = encode(tokenizer, samples[start : start + 256])
        best = model(input_ids=ids).logits[:, :-1].argmax(-1)
        right = (best == labels[:, 1:]) | (labels[:, 1:] == -100)
        correct += int(right.all(dim=1).sum())
    return correct / len(samples)


def linear_weights(model: nn.Module, suffixes: tuple[str, ...]) -> list[nn.Parameter]:
    """Returns the weights whose names end with one of the suffixes, in model order."""
    return [parameter for name, parameter in model.named_parameters() if name.endswith(suffixes)]


def sample_gradients(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, samples: list[Sample], weights: list[nn.Parameter]
) -> Iterator[tuple[float, int, Tensor]]:
    """Yields each sample's loss (sum over its tokens, nats), its number of tokens and its flat gradient."""
    for sample in samples:
        ids, labels = encode(tokenizer, [sample])
        logits = model(input_ids=ids).logits[0, :-1]
        loss = F.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])
        yield float(loss.detach()), int((labels[0, 1:] != -100).sum()), gradient


def task_record(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, samples: list[Sample]
) -> tuple[dict[str, Any], Tensor]:
    """Returns one task's figures and its attention gradients.

    The Fisher information is F = mean over samples of h^2, with h = g / sqrt(T), over the weights of all
    attention and MLP linears. The attention gradients have shape (samples, attention weights), float32, each
    row scaled to unit length.
    """
    attention, mlp = linear_weights(model, ATTENTION), linear_weights(model, MLP)
    split = sum(weight.numel() for weight in attention)
    losses, tokens, energies, directions = [], [], [], []
    fisher = torch.zeros(split + sum(weight.numel() for weight in mlp), dtype=torch.float64)
    for loss, count, gradient in sample_gradients(model, tokenizer, samples, attention + mlp):
        contribution = gradient.double().square() / count
        fisher += contribution
        energies.append(float(contribution.sum()))
        directions.append(F.normalize(gradient[:split], dim=0))
        losses.append(loss)
        tokens.append(count)
    record = {
        "samples": len(samples),
        "accuracy": accuracy(model, tokenizer, samples),
        "mean_tokens": sum(tokens) / len(tokens),
        "mean_loss": sum(losses) / len(losses),
        "largest_sample_share_of_fisher": max(energies) / sum(energies),
        "median_fisher": float((fisher / len(samples)).median()),
    }
    return record, torch.stack(directions)


def conflict_record(math: Tensor, flipped: Tensor, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Returns the median cosine of attention gradients for planted twins and for all other cross pairs.

    Args:
        math: unit gradients of ``math``, shape (samples, weights).
        flipped: unit gradients of ``math_flipped``, same shape.
        pairs: ids of the twins, as in ``planted_pairs.csv``.
    """
    cosines = math @ flipped.T
    twins = torch.zeros_like(cosines, dtype=torch.bool)
    for left, right in pairs:
        twins[int(left.rpartition("_")[2]), int(right.rpartition("_")[2])] = True
    return {
        "median_cosine_of_twins": float(cosines[twins].median()),
        "largest_cosine_of_twins": float(cosines[twins].max()),
        "median_cosine_of_other_pairs": float(cosines[~twins].median()),
    }
