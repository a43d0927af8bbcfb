"""Length: the per-token Fisher against the exact per-token one, and what padding must not change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fisherscope as fs
from tests import models

ROOT = Path(__file__).resolve().parents[2]
BOTH = ("fisher", "exact_per_token")


def collect(
    model: nn.Module, tasks: Any, out: Path, tokenizer: Any = None, **options: Any
) -> fs.ContributionStore:
    return fs.wrap(model, tokenizer).collect(tasks, out, extensions=BOTH, quiet=True, **options)


def tasks_of(make: Any, lengths: tuple[int, ...]) -> dict[str, Any]:
    """A task of each number of loss-bearing tokens: the first position bears no loss."""
    return {str(tokens): [{"input_ids": row} for row in make(tokens + 1)] for tokens in lengths}


def ratios(store: fs.ContributionStore, tokens: int) -> dict[str, float]:
    """Trace of the per-token F over that of the exact one, by block, and over all blocks."""
    found = []
    for labels in ("data", "exact_per_token"):
        table = store.groups(str(tokens), labels=labels).query("kind == 'parameter'")
        by_block = table.groupby("block")["sum"].sum()
        found.append({**by_block.to_dict(), "all": by_block.sum()})
    return {block: found[0][block] / exact for block, exact in found[1].items()}


def one_token(length: int) -> list[list[int]]:
    return [[token] * length for token in range(3, 7)]


def phrases(length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(3, models.VOCABULARY, (4, 4), generator=generator).tolist()
    return [(start * length)[:length] for start in starts]


@pytest.mark.parametrize("name", ["llama-biases", "gpt2"])
def test_a_single_token_has_a_ratio_of_one(name: str, tmp_path: Path) -> None:
    """With T = 1 both are the square of one gradient, entry by entry, behind a prompt of any length."""
    rows = [
        {
            "input_ids": row["input_ids"],
            "labels": [-100] * (len(row["input_ids"]) - 1) + row["input_ids"][-1:],
        }
        for row in models.rows(5)
    ]
    store = collect(
        models.build(models.named(name), layers=1), {"1": rows}, tmp_path / "run.fs", batch_size=3
    )
    for parameter in store.parameters:
        found, exact = store.fisher("1", parameter), store.fisher("1", parameter, labels="exact_per_token")
        assert models.relative_error(found, exact, floor=1e-12) <= 1e-5, parameter
    assert ratios(store, 1) == pytest.approx(dict.fromkeys(ratios(store, 1), 1.0), rel=1e-5)


@pytest.mark.parametrize("name", ["llama-biases", "gpt2"])
def test_the_ratio_of_every_entry_is_at_most_the_length(name: str, tmp_path: Path) -> None:
    """(sum of T terms)^2 / T is at most the sum of their squares; and it is above and below their mean."""
    tokens = 7
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, models.VOCABULARY, (4, tokens + 1), generator=generator).tolist()
    model = models.build(models.named(name), layers=1)
    store = collect(model, {"7": [{"input_ids": row} for row in ids]}, tmp_path / "run.fs", batch_size=3)
    above = below = 0
    for parameter in store.parameters:
        found, exact = store.fisher("7", parameter), store.fisher("7", parameter, labels="exact_per_token")
        assert bool((found <= tokens * exact * (1 + 1e-4) + 1e-6 * exact.max()).all()), parameter
        above += int((found > 1.5 * exact).sum())
        below += int((found < exact / 1.5).sum())
    assert above > 100
    assert below > 100


def test_gradients_that_are_all_the_same_have_the_length_as_ratio(tmp_path: Path) -> None:
    """One token repeated, with rotary positions: every position sees the same, so the ratio is T."""
    model = models.build(models.named("llama"), layers=1)
    lengths = (1, 2, 9)
    store = collect(model, tasks_of(one_token, lengths), tmp_path / "run.fs", batch_size=4)
    for tokens in lengths:
        found = ratios(store, tokens)
        for block in ("V", "O", "mlp", "all"):
            assert found[block] == pytest.approx(tokens, rel=1e-3), (block, tokens)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_ratio_grows_with_the_length_where_gradients_cohere(name: str, tmp_path: Path) -> None:
    """Phrases repeated: at three times the length more than twice the ratio, in every block."""
    lengths = (8, 24)
    model = models.build(models.named(name), layers=1)
    store = collect(model, tasks_of(phrases, lengths), tmp_path / "run.fs", batch_size=4)
    short, long = ratios(store, 8), ratios(store, 24)
    for block, value in short.items():
        assert 2 * value < long[block] < 24, block


def test_the_ratio_is_one_on_text_that_the_model_has_drawn(tmp_path: Path) -> None:
    """There token gradients have mean zero given the past, so they are uncorrelated, whatever the length."""
    model = models.build(models.named("llama"), layers=1)
    lengths = (4, 16)

    @torch.no_grad()
    def drawn(length: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(3, models.VOCABULARY, (128, 1), generator=generator)
        while ids.shape[1] < length:
            probabilities = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
        return ids.tolist()

    store = collect(model, tasks_of(drawn, lengths), tmp_path / "run.fs")
    for tokens in lengths:
        for block, value in ratios(store, tokens).items():
            assert value == pytest.approx(1, abs=0.2), (block, tokens)


def by_hand(
    model: nn.Module, data: list[dict[str, list[int]]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both F of every parameter, from one backward pass per token of samples that are not padded."""
    parameters = dict(model.named_parameters())
    together, alone = ({n: torch.zeros_like(p) for n, p in parameters.items()} for _ in range(2))
    for row in data:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        bearing = (labels != -100).nonzero().flatten().tolist()
        total = {n: torch.zeros_like(p) for n, p in parameters.items()}
        for t in bearing:
            loss = F.cross_entropy(logits[t], labels[t])
            gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
            for n, g in zip(parameters, gradients, strict=True):
                total[n] += g
                alone[n] += g.square() / len(bearing) / len(data)
        for n, g in total.items():
            together[n] += g.square() / len(bearing) / len(data)
    return together, alone


def padded(rows: list[dict[str, list[int]]], side: str) -> list[dict[str, list[int]]]:
    """Rows of one length, with the masks of a collator."""
    width = max(len(row["input_ids"]) for row in rows)
    out = []
    for row in rows:
        filler = width - len(row["input_ids"])
        parts = {"input_ids": 0, "labels": 0, "attention_mask": 0}  # the mask alone says what is padding
        columns = {**row, "attention_mask": [1] * len(row["input_ids"])}
        out.append(
            {
                k: [v] * filler + columns[k] if side == "left" else columns[k] + [v] * filler
                for k, v in parts.items()
            }
        )
    return out


@dataclass
class Unpadded:
    """A model, rows with prompts that bear no loss, and what one sample at a time gives."""

    model: nn.Module
    rows: list[dict[str, list[int]]]
    store: fs.ContributionStore
    by_loop: dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module", params=["llama-biases", "gpt2"])
def unpadded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Unpadded:
    model, rows = models.build(models.named(request.param)), models.rows(4)
    rows[-1]["labels"] = list(rows[-1]["input_ids"])  # no prompt: its first token must not follow a pad
    assert len(rows[-1]["labels"]) < max(len(row["labels"]) for row in rows)
    assert len({len(row["input_ids"]) for row in rows}) > 2
    assert len({row["labels"].count(-100) for row in rows}) > 2
    store = collect(model, {"a": rows}, tmp_path_factory.mktemp("alone") / "run.fs", batch_size=1)
    together, exact = by_hand(model, rows)
    return Unpadded(model, rows, store, {"data": together, "exact_per_token": exact})


@pytest.mark.parametrize("where", ["batches", "rows"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_prompts_change_nothing(
    unpadded: Unpadded, side: str, where: str, tmp_path: Path
) -> None:
    """F, exact per-token F and group values of padded samples with masked prompts equal those of the loop."""
    given = padded(unpadded.rows, side) if where == "rows" else unpadded.rows
    tokenizer = models.PadsOnTheLeft() if side == "left" else None
    store = collect(unpadded.model, {"a": given}, tmp_path / "run.fs", tokenizer, batch_size=5)
    assert store.header.fingerprint["pad_side"] == side
    for labels, by_loop in unpadded.by_loop.items():
        floor = 1e-6 * max(float(by_loop[parameter].max()) for parameter in store.parameters)
        for parameter in store.parameters:
            found = store.fisher("a", parameter, labels=labels)
            alone = unpadded.store.fisher("a", parameter, labels=labels)
            assert models.relative_error(found, alone, floor=floor) <= 1e-5, (parameter, labels)
            assert models.relative_error(found, by_loop[parameter], floor=floor) <= 1e-5, (parameter, labels)
    for quantity in ("square", "dot"):
        values, alone = (
            torch.from_numpy(s.group_values("a")[quantity].values.copy()) for s in (store, unpadded.store)
        )
        assert models.relative_error(values, alone) <= 1e-5, quantity


@pytest.mark.slow
def test_the_experiment_runs(tmp_path: Path) -> None:
    """Its smallest form finds a ratio of 1 and of T where they must be, and padding changes nothing."""
    out = tmp_path / "length.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "length.py"), "--smoke", "--json", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    rows = {(row["model"], row["text"], row["block"], row["tokens"]): row["ratio"] for row in found["rows"]}
    assert {tokens for *_, tokens in rows} == {4, 8}
    for (model, text, block, tokens), ratio in rows.items():
        assert 0 < ratio <= tokens * (1 + 1e-3), (model, text, block)
        if text == "one token repeated" and block == "V":
            assert ratio == pytest.approx(tokens, rel=1e-3)
    in_float64 = [one["error"] for one in found["about"]["padding"] if one["dtype"] == "float64"]
    assert len(in_float64) == 2 * 4 * 3
    assert max(in_float64) <= 1e-5
    assert "one token repeated" in done.stdout
