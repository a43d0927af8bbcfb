"""What length does to the Fisher: per-token F against exact per-token F, on samples of 8 to 64 tokens.

With g_t the gradient of token t's loss and T tokens in a sample::

    per token         F = E[(g_1 + ... + g_T)^2 / T]         one backward pass
    exact per token   F = E[(g_1^2 + ... + g_T^2) / T]       T backward passes

The ratio of the first to the second, of their sums over the entries of a block, lies between 0 and T. It is 1
where the gradients of a sample's tokens are uncorrelated, as they are in expectation on text that the model
itself has drawn (each has mean zero, given the tokens before it), and T where they are all the same.

The embedded demo model and a model of its shape with random weights see such texts, lines of the demo's tasks
one after the other, phrases of four tokens that are repeated, and one token that is repeated. Then samples of
unequal length, with prompts that bear no loss, are collected one by one and padded on either side: all values
must stay as they are.

    python benchmarks/length.py [--samples 64] [--json results.json] [--smoke]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from harness import write
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import fisherscope as fs
from fisherscope.demo import model_path, task_files
from fisherscope.instrument.data import read_jsonl

LENGTHS = (8, 16, 32, 64)
SMOKE = (4, 8)
BLOCKS = ("Q", "K", "V", "O", "mlp")
PHRASE = 4
TOLERANCE = 1e-5
ROUNDING = 1e-10

Ids = list[list[int]]
Texts = Callable[[int, int], Ids]


@dataclass(frozen=True)
class Ratio:
    """One block on samples of one length.

    Attributes:
        model, text: what was collected.
        tokens: T, labels of each sample that bear loss.
        block: "Q", "K", "V", "O" or "mlp", over all layers; "all" for their sum.
        ratio: trace of the per-token F over that of the exact per-token F; there is none where both are
            zero but for rounding.
    """

    model: str
    text: str
    tokens: int
    block: str
    ratio: float


@dataclass(frozen=True)
class Difference:
    """How far padding moves a quantity.

    Attributes:
        model, padding, quantity: what was compared with one sample at a time.
        dtype: of the model and of the products.
        error: the largest difference of any entry, relative to the largest entry of its parameter.
    """

    model: str
    padding: str
    quantity: str
    dtype: str
    error: float


def demo() -> tuple[PreTrainedModel, Any]:
    """The trained model that comes with the package, and its tokenizer."""
    path = model_path()
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def untrained(config: Any) -> PreTrainedModel:
    """A model of the same shape with random weights."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def texts(model: PreTrainedModel, tokenizer: Any) -> dict[str, Texts]:
    """Ways to make ``n`` rows of ``length`` ids, from text whose gradients cohere least to most."""
    tasks = [
        [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in read_jsonl(path)]
        for path in task_files().values()
    ]
    lines = [line for several in zip(*tasks, strict=True) for line in several]
    alphabet = sorted({token for line in lines for token in line})

    def of_tasks(n: int, length: int) -> Ids:
        # row i begins with a line of its own, and goes on with those behind it in the same task
        starts = [(tasks[i % len(tasks)], i // len(tasks)) for i in range(n)]
        endless = [itertools.chain.from_iterable(itertools.cycle(t[at:] + t[:at])) for t, at in starts]
        return [list(itertools.islice(row, length)) for row in endless]

    def of_phrases(n: int, length: int) -> Ids:
        return [(line[:PHRASE] * length)[:length] for line in itertools.islice(itertools.cycle(lines), n)]

    def of_one_token(n: int, length: int) -> Ids:
        return [[token] * length for token in itertools.islice(itertools.cycle(alphabet), n)]

    return {
        "drawn from the model": lambda n, length: drawn(model, alphabet, n, length),
        "lines of the tasks": of_tasks,
        "phrases repeated": of_phrases,
        "one token repeated": of_one_token,
    }


@torch.no_grad()
def drawn(model: PreTrainedModel, first: Sequence[int], n: int, length: int) -> Ids:
    """Rows that begin with one of ``first`` and go on as the model has it, at temperature 1."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.tensor(list(itertools.islice(itertools.cycle(first), n))).unsqueeze(1)
    while ids.shape[1] < length:
        probabilities = model(input_ids=ids, use_cache=False).logits[:, -1].double().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return ids.tolist()


def ratios(
    name: str, model: PreTrainedModel, sources: dict[str, Texts], samples: int, lengths: Sequence[int]
) -> Iterator[Ratio]:
    """Collect every text at every length, and compare the two per block."""
    extensions = (fs.Fisher(shape="groups"), fs.ExactPerToken(shape="groups"))
    for text, make in sources.items():
        # the first token bears no loss: one more of them
        tasks = {str(tokens): plain(make(samples, tokens + 1)) for tokens in lengths}
        with tempfile.TemporaryDirectory() as folder:
            store = fs.wrap(model).collect(
                tasks, Path(folder) / "run.fs", extensions=extensions, durability="none", quiet=True
            )
            for tokens in lengths:
                found, exact = (traces(store, str(tokens), labels) for labels in ("data", "exact_per_token"))
                for block in ("all", *BLOCKS):
                    if exact[block] > ROUNDING * exact["all"]:
                        yield Ratio(name, text, tokens, block, found[block] / exact[block])


def traces(store: fs.ContributionStore, task: str, labels: str) -> dict[str, float]:
    """Sum of F over the entries of each block, weights and biases of all layers."""
    table = store.groups(task, labels=labels)
    by_block = table[table["kind"] == "parameter"].groupby("block")["sum"].sum()
    return {block: float(by_block[block]) for block in BLOCKS} | {"all": float(by_block.sum())}


def plain(ids: Ids) -> list[dict[str, list[int]]]:
    """Rows with loss on every token but the first."""
    return [{"input_ids": row} for row in ids]


def with_prompts(ids: Ids) -> list[dict[str, list[int]]]:
    """The same rows with unequal lengths, and no loss on a prompt of a third; the shortest have no prompt."""
    rows = []
    for number, row in enumerate(ids):
        kept = row[: len(row) - 2 * (number % 4)]
        prompt = len(kept) // 3 if number % 4 < 3 else 0
        rows.append({"input_ids": kept, "labels": [-100] * prompt + kept[prompt:]})
    return rows


def padded(rows: Sequence[dict[str, list[int]]], side: str, pad: int) -> list[dict[str, list[int]]]:
    """Rows of one length, with a mask, as a collator makes them."""
    width = max(len(row["input_ids"]) for row in rows)
    out = []
    for row in rows:
        filler = width - len(row["input_ids"])
        columns = {**row, "attention_mask": [1] * len(row["input_ids"])}
        fill = {"input_ids": pad, "labels": -100, "attention_mask": 0}
        out.append(
            {
                k: [fill[k]] * filler + v if side == "left" else v + [fill[k]] * filler
                for k, v in columns.items()
            }
        )
    return out


def differences(
    name: str, model: PreTrainedModel, tokenizer: Any, ids: Ids, dtype: str
) -> Iterator[Difference]:
    """Padding of batches on either side, and of the rows themselves, against one sample at a time."""
    rows, n = with_prompts(ids), len(ids)
    model = copy.deepcopy(model).to(getattr(torch, dtype))
    pad = tokenizer.pad_token_id
    cases = {
        "right": (rows, "right"),
        "left": (rows, "left"),
        "right, in the rows": (padded(rows, "right", pad), "right"),
        "left, in the rows": (padded(rows, "left", pad), "left"),
    }
    alone = quantities(model, tokenizer, rows, 1, "right", dtype)
    for padding, (given, side) in cases.items():
        found = quantities(model, tokenizer, given, n, side, dtype)
        for quantity, expected in alone.items():
            worst = max(
                float((a - b).abs().max() / b.abs().max())
                for a, b in zip(found[quantity], expected, strict=True)
            )
            yield Difference(name, padding, quantity, dtype, worst)


def quantities(
    model: PreTrainedModel, tokenizer: Any, rows: Any, batch_size: int, side: str, dtype: Any
) -> dict[str, list[torch.Tensor]]:
    """Both F of every parameter in full shape, and the squared norms of samples and groups."""
    tokenizer.padding_side = side
    with tempfile.TemporaryDirectory() as folder:
        store = fs.wrap(model, tokenizer).collect(
            {"a": rows},
            Path(folder) / "run.fs",
            extensions=("fisher", "exact_per_token"),
            batch_size=batch_size,
            compute_dtype=dtype,
            durability="none",
            quiet=True,
        )
        return {
            "F": [store.fisher("a", p) for p in store.parameters],
            "exact per-token F": [store.fisher("a", p, labels="exact_per_token") for p in store.parameters],
            "group values": [torch.from_numpy(store.group_values("a")["square"].values.copy())],
        }


def show(rows: Sequence[Ratio], lengths: Sequence[int]) -> None:
    """Print one model."""
    print(f"\n{rows[0].model}: per-token F / exact per-token F")
    print(f"  {'T =':<30}" + "".join(f"{tokens:>8}" for tokens in lengths))
    found = {(row.text, row.block, row.tokens): row.ratio for row in rows}
    for text in dict.fromkeys(row.text for row in rows):
        for block in ("all", *BLOCKS):
            label = text if block == "all" else f"  {block}"
            values = [found.get((text, block, tokens)) for tokens in lengths]
            shown = "".join(f"{'-':>8}" if value is None else f"{value:8.2f}" for value in values)
            print(f"  {label:<30}{shown}")


def show_padding(moved: Sequence[Difference]) -> None:
    """Print what padding does, the worst of all models."""
    print(
        "\npadding against one sample at a time: the largest change, relative to a parameter's largest entry"
    )
    print(f"  {'':<22}{'':<20}{'float32':>10}{'float64':>10}")
    for padding, quantity in dict.fromkeys((one.padding, one.quantity) for one in moved):
        worst = [
            max(
                one.error for one in moved if (one.padding, one.quantity, one.dtype) == (padding, quantity, d)
            )
            for d in ("float32", "float64")
        ]
        print(f"  {padding:<22}{quantity:<20}" + "".join(f"{error:>10.0e}" for error in worst))


def main() -> None:
    """Measure, print, and fail where padding changes a value."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=64, help="of each length")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="few and short samples")
    arguments = parser.parse_args()
    lengths = SMOKE if arguments.smoke else LENGTHS
    samples = min(arguments.samples, 4) if arguments.smoke else arguments.samples
    trained, tokenizer = demo()
    models = {
        "demo model": trained,
        "random weights": untrained(trained.config),
    }
    rows: list[Ratio] = []
    moved: list[Difference] = []
    for name, model in models.items():
        sources = texts(model, tokenizer)
        found = list(ratios(name, model, sources, samples, lengths))
        show(found, lengths)
        rows += found
        given = sources["lines of the tasks"](min(samples, 8), lengths[1] + 1)
        for dtype in ("float32", "float64"):
            moved += differences(name, model, tokenizer, given, dtype)
    show_padding(moved)
    if arguments.json:
        write(arguments.json, rows, samples=samples, padding=[vars(one) for one in moved])
    # in float32, batches of another shape are rounded otherwise
    if worst := [one for one in moved if one.dtype == "float64" and one.error > TOLERANCE]:
        raise SystemExit(f"padding changes values by more than {TOLERANCE}: {worst}")


if __name__ == "__main__":
    main()
