"""Trains the embedded demo model and writes everything that ships with it.

    python examples/demo_model/train.py [--out DIR] [--seed N]

The run takes minutes on two CPU cores and is reproducible bit for bit on one machine. The README beside this
file says what is written and why training ends with label smoothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tasks
import torch
from measure import accuracy, conflict_record, task_record
from network import build_model, build_tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

DEFAULT_OUT = Path(__file__).resolve().parents[2] / "fisherscope" / "demo"
SAMPLES_PER_TASK = 192
EVALUATED_PROGRAMS = 2000
MUON_RATE, ADAM_RATE = 2e-2, 2e-3
LABEL_SMOOTHING = 0.1
MAIN_MIX, SMOOTHING_MIX = tasks.Mix(20, 24, 20), tasks.Mix(40, 24, 0)
MAX_SHARE, MIN_ACCURACY = 0.15, 0.95


def parse_arguments() -> argparse.Namespace:
    """Returns the command-line options."""
    parser = argparse.ArgumentParser(description="Train the embedded demo model.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="receives model/ and data/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1400, help="steps of the main phase")
    parser.add_argument("--smoothing-steps", type=int, default=400, help="steps of the label-smoothing phase")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def batch_tensors(tokenizer: Qwen2Tokenizer, rows: list[tasks.Row]) -> tuple[Tensor, Tensor]:
    """Returns the ids that the model reads and the labels (-100: no loss), both (rows, longest)."""
    padding: dict[str, Any] = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    ids = tokenizer([row.shown for row in rows], **padding)["input_ids"]
    labels = tokenizer([row.text for row in rows], **padding)["input_ids"]
    for index, row in enumerate(rows):
        labels[index, : len(row.loss)][~torch.tensor(row.loss)] = -100
        labels[index, len(row.loss) :] = -100
    return ids, labels


def batch_loss(
    model: Qwen2ForCausalLM, ids: Tensor, labels: Tensor, smoothing: float, symbols: Tensor
) -> Tensor:
    """Returns the mean loss over the labelled tokens; the output layer runs on those only.

    Args:
        model: the model.
        ids: what it reads, (rows, length).
        labels: what it is to predict, -100 where there is no loss, same shape.
        smoothing: probability that the targets spread evenly over ``symbols``.
        symbols: token ids.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    bearing = targets != -100
    log_probabilities = F.log_softmax(model.lm_head(hidden[bearing]), dim=-1)
    true = F.nll_loss(log_probabilities, targets[bearing])
    if not smoothing:
        return true
    return (1 - smoothing) * true - smoothing * log_probabilities[:, symbols].mean()


def build_optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices of the blocks and AdamW for embedding, norms and biases.

    With AdamW alone the heads that copy take several times as many steps to appear.
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def cosine(step: int, steps: int, warm_up: int) -> float:
    """Returns the factor of the learning rates: a linear warm-up, then a cosine to zero."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def report(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> str:
    """Returns the accuracies on some held-out problems, in words."""
    sums = random.Random(1).sample(tasks.held_out_math(), 256)
    programs = tasks.held_out_code(random.Random(1), 256)
    right = [accuracy(model, tokenizer, samples) for samples in (sums, programs)]
    return f"held-out math {right[0]:.3f}  code {right[1]:.3f}"


def train_phase(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    rng: random.Random,
    *,
    name: str,
    steps: int,
    mix: tasks.Mix,
    scale: float = 1.0,
    warm_up: int = 100,
    smoothing: float = 0.0,
) -> None:
    """Trains in place, in one phase with its own optimisers and schedule.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        rng: source of the training rows.
        name: what the progress lines call the phase.
        steps: optimiser steps.
        mix: rows of each kind per step.
        scale: factor on the peak learning rates.
        warm_up: steps of linear warm-up.
        smoothing: label smoothing, over the symbols that an answer can hold.
    """
    pairs = tasks.training_pairs()
    symbols = torch.tensor(tokenizer(tasks.ANSWER_SYMBOLS)["input_ids"])
    optimizers = build_optimizers(model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [scale * group["lr"] for group in groups]
    started = time.monotonic()
    for step in range(steps):
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * cosine(step, steps, warm_up)
        ids, labels = batch_tensors(tokenizer, tasks.training_batch(rng, pairs, mix))
        loss = batch_loss(model, ids, labels, smoothing, symbols)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            words = report(model, tokenizer)
            print(f"{name} {step + 1}/{steps}  loss {loss.item():.4f}  {words}  {seconds:.0f} s", flush=True)


def build_record(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    samples: dict[str, list[tasks.Sample]],
    pairs: list[tuple[str, str]],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Returns the figures that are kept beside the weights."""
    programs = tasks.held_out_code(random.Random(arguments.seed + 2), EVALUATED_PROGRAMS)
    sums = tasks.held_out_math()
    measured = {name: task_record(model, tokenizer, rows) for name, rows in samples.items()}
    return {
        "seed": arguments.seed,
        "steps": arguments.steps,
        "smoothing_steps": arguments.smoothing_steps,
        "label_smoothing": LABEL_SMOOTHING,
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out_problems": {"math": len(sums), "code": len(programs)},
        "held_out_accuracy": {
            "math": accuracy(model, tokenizer, sums),
            "code": accuracy(model, tokenizer, programs),
        },
        "tasks": {name: record for name, (record, _) in measured.items()},
        "planted_conflict": conflict_record(measured["math"][1], measured["math_flipped"][1], pairs),
    }


def write_demo(
    out: Path,
    model: Qwen2ForCausalLM,
    samples: dict[str, list[tasks.Sample]],
    pairs: list[tuple[str, str]],
    record: dict[str, Any],
) -> None:
    """Writes ``model/`` and ``data/`` under ``out``."""
    model.save_pretrained(out / "model")
    build_tokenizer().save_pretrained(out / "model")  # a fresh one: a used one saves its padding settings
    (out / "model" / "model.safetensors").chmod(0o644)
    (out / "model" / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, rows in samples.items():
        lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}) + "\n" for row in rows]
        (data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    with (data / "planted_pairs.csv").open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle, lineterminator="\n").writerows([("math", "math_flipped"), *pairs])


def shortcomings(record: dict[str, Any]) -> list[str]:
    """Returns, in words, what keeps the trained model from being shipped; nothing when it is fit."""
    low = [
        f"held-out accuracy of {name} is {value:.3f}, below {MIN_ACCURACY}"
        for name, value in record["held_out_accuracy"].items()
        if value < MIN_ACCURACY
    ]
    large = [
        f"one sample of {name} carries {task['largest_sample_share_of_fisher']:.2f} of F, above {MAX_SHARE}"
        for name, task in record["tasks"].items()
        if task["largest_sample_share_of_fisher"] > MAX_SHARE
    ]
    return low + large


def main() -> int:
    """Trains, measures and writes; returns 1 when the result is not fit to ship."""
    arguments = parse_arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, arguments.seed)
    rng = random.Random(arguments.seed)
    model.train()
    train_phase(model, tokenizer, rng, name="main", steps=arguments.steps, mix=MAIN_MIX)
    train_phase(
        model,
        tokenizer,
        rng,
        name="smoothing",
        steps=arguments.smoothing_steps,
        mix=SMOOTHING_MIX,
        scale=0.25,
        warm_up=20,
        smoothing=LABEL_SMOOTHING,
    )
    model.eval()
    samples, pairs = tasks.shipped_tasks(arguments.seed, SAMPLES_PER_TASK)
    record = build_record(model, tokenizer, samples, pairs, arguments)
    write_demo(arguments.out, model, samples, pairs, record)
    print(json.dumps(record, indent=2))
    print(f"wrote {arguments.out}")
    problems = shortcomings(record)
    for problem in problems:
        print(f"not fit to ship: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
