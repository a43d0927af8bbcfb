"""A small GPT-2 that is trained for a minute on two synthetic tasks with few labels, and samples of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

LABELS = 8
COPIED = 4
PLUS, EQUALS, SEPARATOR = range(LABELS, LABELS + 3)
IGNORED = -100

Task = list[dict[str, list[int]]]


@dataclass(frozen=True)
class Trained:
    """A model and what it was trained on.

    Attributes:
        model: in evaluation mode.
        tasks: samples of "copy" and "modular", of which the model has seen some in training.
        losses: nats per loss-bearing token, by task.
    """

    model: GPT2LMHeadModel
    tasks: dict[str, Task]
    losses: dict[str, float]


def copying(n: int, generator: torch.Generator) -> Tensor:
    """Rows of four symbols, a separator, and the four symbols again ``[n, 9]``."""
    symbols = torch.randint(LABELS, (n, COPIED), generator=generator)
    return torch.cat([symbols, torch.full((n, 1), SEPARATOR), symbols], 1)


def adding(n: int, generator: torch.Generator) -> Tensor:
    """Rows of a + b + c = (a + b + c) mod 8 ``[n, 7]``."""
    a, b, c = torch.randint(LABELS, (3, n), generator=generator)
    plus, equals = torch.full((n,), PLUS), torch.full((n,), EQUALS)
    return torch.stack([a, plus, b, plus, c, equals, (a + b + c) % LABELS], 1)


MAKERS = {"copy": (copying, COPIED), "modular": (adding, 1)}


def trained(seed: int, n: int, *, steps: int = 1000, lr: float = 2e-3) -> Trained:
    """Train a model on both tasks in turn.

    Args:
        seed: of weights and data.
        n: samples per task that are returned, all different.
        steps: of training, each on 64 fresh samples of both tasks.
        lr: learning rate of AdamW.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=16, vocab_size=LABELS + 3, bos_token_id=0, eos_token_id=0,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(_loss(model, make(64, generator), k) for make, k in MAKERS.values()).backward()
        optimizer.step()
    model.eval()
    tasks, losses = {}, {}
    for name, (make, answer) in MAKERS.items():
        # dict.fromkeys: the first of equal rows, in order
        drawn = dict.fromkeys(map(tuple, make(4 * n, generator).tolist()))
        rows = [list(row) for row in drawn][:n]
        tasks[name] = [
            {"input_ids": row, "labels": [IGNORED] * (len(row) - answer) + row[-answer:]} for row in rows
        ]
        with torch.no_grad():
            losses[name] = float(_loss(model, torch.tensor(rows), answer))
    return Trained(model, tasks, losses)


def _loss(model: GPT2LMHeadModel, rows: Tensor, answer: int) -> Tensor:
    """Mean over the tokens of the answers."""
    logits = model(input_ids=rows).logits[:, -answer - 1 : -1]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, -answer:].flatten())
