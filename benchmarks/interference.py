"""How fast all pairs of samples are scored, and in how much memory; ratios from one run.

- **pairs**: the heat map of all head slices of two tasks, read from a store, against a loop that
  evaluates the formula for one pair after the other, out of gradients and F in memory. Bar: 30 times as
  fast (n = 64 per task, 8 heads, width 256). Without a bar: a loop for which h and F + lam were made before.
- **rate**: floating-point operations per second of the matrix products, as a share of the largest rate
  that products of square matrices reach on this machine. Once for slices in memory (bar: half, from
  n = 256 on), and once for the heat map from a store, reading and summaries included.
- **memory**: what the heat map takes beyond what the process had before, as a share of the budget that it was
  given (bar: 1), where the gradients of a slice do not fit. A process of its own, anonymous memory.

    python benchmarks/interference.py [--only pairs] [--repeats 5] [--json results.json] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from bars import Row, row, show
from harness import interleaved, qwen2, token_ids, write
from torch import Tensor
from transformers.utils import logging

import fisherscope as fs
from fisherscope.analyses import InterferenceConfig
from fisherscope.analyses.interference import compute_heatmap, interference_matrix
from fisherscope.analyses.slices import SliceReader, damping, stored_blocks
from fisherscope.store import ContributionStore

FORMS = ("unsigned", "natural", "signed", "symmetric")
PARTS = ("pairs", "rate", "memory")
TOKENS = 8
HEAD = 32


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        width: of the model; a head has 32 entries per row.
        pairs: samples per task of the loop over pairs.
        rates: samples per task of the rates.
        square: edge of the square matrices.
        looped: pairs that the loop goes through for each slice; its time is scaled to all.
        budget: MiB.
    """

    width: int = 256
    pairs: int = 64
    rates: tuple[int, ...] = (256, 512)
    square: int = 1024
    looped: int = 256
    budget: int = 64


SMOKE = Size(64, 4, (6,), 64, 8, 1)


@contextmanager
def collected(width: int, n: int) -> Iterator[ContributionStore]:
    """A store of two tasks, from one layer of random weights."""
    scope = fs.wrap(qwen2(width, 1))
    tasks = {
        name: [{"input_ids": ids} for ids in token_ids(n, TOKENS, seed=seed)]
        for seed, name in enumerate(("a", "b"))
    }
    dense = fs.SampleGradients(encoding="dense")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.fs"
        yield scope.collect(tasks, path, extensions=("fisher", dense), durability="none", quiet=True)


@dataclass(frozen=True)
class Damped:
    """Default damping."""

    epsilon: float = 1.2e-38
    ridge: float = 0.0
    ridge_rel: float = 1e-6


def formula(form: str, h_i: Tensor, g_j: Tensor, h_j: Tensor, f: Tensor) -> Tensor:
    """The score of one pair; f is F + lam."""
    match form:
        case "unsigned":
            return (h_i.square() / f * g_j.abs()).mean()
        case "natural":
            return (h_i.square() / f * g_j.abs() / f.sqrt()).mean()
        case "signed":
            return (h_i * h_j / f).mean()
    return ((h_i * h_j).abs() / f).mean()


def loop(store: ContributionStore, looped: int, form: str, *, prepared: bool) -> Callable[[], list[float]]:
    """Scores of some pairs of each slice, one pair at a time, out of what is in memory already."""
    reader = SliceReader(store, 1 << 30)
    n = reader.rows("a")
    slices = []
    for block in stored_blocks(store):
        by_task = [reader.fisher(task, block) for task in ("a", "b")]
        fisher = by_task[0] if form in {"unsigned", "natural"} else (by_task[0] + by_task[1]) / 2
        lam = damping(fisher, Damped())
        for head in range(len(block)):
            g = [reader.gradients(task, block, head, slice(0, n)) for task in ("a", "b")]
            slices.append((g, fisher[head], lam))
    root = [reader.factors(task).tolist() for task in ("a", "b")]
    factors = [reader.factors(task)[:, None] for task in ("a", "b")]
    ready = [(g[0] * factors[0], g[1], g[1] * factors[1], fisher + lam) for g, fisher, lam in slices]
    chosen = [divmod(pair, n) for pair in range(looped)]

    def bare() -> list[float]:
        return [
            float(formula(form, g[0][i] * root[0][i], g[1][j], g[1][j] * root[1][j], fisher + lam))
            for g, fisher, lam in slices
            for i, j in chosen
        ]

    def hoisted() -> list[float]:
        return [float(formula(form, h_a[i], g[j], h_b[j], f)) for h_a, g, h_b, f in ready for i, j in chosen]

    return hoisted if prepared else bare


def pairs(size: Size, repeats: int) -> list[Row]:
    """The heat map against the loop."""
    n = size.pairs
    setting = f"all slices, {n} x {n} samples, {size.width // HEAD} heads, width {size.width}: times the loop"
    rows = []
    with collected(size.width, n) as store:
        for form in FORMS:
            config = InterferenceConfig(form=form)
            seconds = interleaved(
                {
                    "map": lambda config=config: compute_heatmap(store, "a", "b", config=config),
                    "bare": loop(store, size.looped, form, prepared=False),
                    "hoisted": loop(store, size.looped, form, prepared=True),
                },
                repeats,
            )
            share = n * n / size.looped
            for name, note, least in (("bare", "", 30), ("hoisted", ", h and F + lam made before", 0)):
                times = [share * b / a for a, b in zip(seconds["map"], seconds[name], strict=True)]
                rows.append(row(setting, form + note, times, least=least))
    return rows


def rate(size: Size, repeats: int) -> list[Row]:
    """Products of slices, and heat maps, against square products."""
    rows = []
    edge = torch.randn(size.square, size.square)
    for n in size.rates:
        setting = f"{n} x {n} samples, width {size.width}: share of the rate of square products"
        entries = HEAD * size.width
        first, second = torch.randn(2, n, entries).unbind()
        fisher = torch.rand(entries)
        functions: dict[str, Callable[[], object]] = {"square": lambda: edge @ edge}
        work = {"square": 2 * size.square**3}
        for form in FORMS:
            name = f"{form}, slice in memory"
            functions[name] = partial(interference_matrix, first, second, fisher, 1e-6, form=form)
            work[name] = 2 * n * n * entries
        with collected(size.width, n) as store:
            name = "unsigned, heat map from the store"
            functions[name] = lambda: compute_heatmap(store, "a", "b")
            work[name] = (
                2 * n * n * sum(len(block) * block.partition.slice_size for block in stored_blocks(store))
            )
            seconds = interleaved(functions, repeats)
        best = min(seconds["square"])
        for name in list(functions)[1:]:
            shares = [work[name] / t / (work["square"] / best) for t in seconds[name]]
            bar = {"least": 0.5} if name.endswith("memory") else {}
            rows.append(row(setting, name, shares, **bar))
    return rows


def memory(size: Size, repeats: int) -> list[Row]:
    """Peaks of processes of their own."""
    n = size.rates[-1]
    with collected(size.width, n) as store:
        shares = []
        for _ in range(min(repeats, 3)):
            command = [sys.executable, __file__, "--child", str(store.path), str(size.budget)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            shares.append(json.loads(done.stdout.splitlines()[-1]) / (size.budget << 20))
    held = 2 * n * HEAD * size.width * 4 / (1 << 20)
    setting = f"{n} x {n} samples, {held:.1f} MiB per slice, budget {size.budget} MiB: share of the budget"
    return [row(setting, "unsigned, heat map", shares, most=1)]


def anonymous() -> int:
    """Bytes of this process that are not pages of files; the store's shards are mapped."""
    line = next(r for r in Path("/proc/self/status").read_text().splitlines() if r.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def child(path: str, budget: int) -> None:
    """Print the bytes that a heat map adds at its peak."""
    store = fs.open_store(path)
    # what is loaded lazily is loaded before
    compute_heatmap(store, "a", "b", max_samples_per_task=2)
    before = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    compute_heatmap(store, "a", "b", memory_budget=budget << 20)
    done.set()
    watcher.join()
    print(json.dumps(max(peak - before, 1)))


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]))
        return
    logging.set_verbosity_error()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=PARTS, help="one part; all otherwise")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    size = SMOKE if arguments.smoke else Size()
    rows: list[Row] = []
    for name, measure in (("pairs", pairs), ("rate", rate), ("memory", memory)):
        if arguments.only in {None, name}:
            found = measure(size, arguments.repeats)
            show(found)
            rows += found
    if arguments.json:
        write(arguments.json, rows)


if __name__ == "__main__":
    main()
