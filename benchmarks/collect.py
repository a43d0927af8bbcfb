"""Collection against a plain forward+backward, the floor, and other libraries; ratios from one run.

Each setting is a 4-layer Qwen2 of random weights, and a GPT-2 with every parameter instrumented. All
variants of a setting run interleaved, so that a busy machine slows them alike; printed are medians and
quartiles of the ratios to a plain batched forward and backward pass with weight gradients in the same round.

    python benchmarks/collect.py [--repeats 7] [--setting 256,32,64] [--json results.json]
        [--only fisher|collect|peers|gpt2] [--cpu-time]
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from harness import (
    HeadNorms,
    Instrumented,
    Nothing,
    Products,
    Ratio,
    Squares,
    gpt2,
    interleaved,
    plain,
    qwen2,
    ratios,
    show,
    token_ids,
    write,
)
from peers import peers
from transformers import PreTrainedModel
from transformers.utils import logging

import fisherscope as fs

SETTINGS = [(256, 32, 64), (256, 128, 32), (512, 32, 64)]
BATCHES = 4
PARTS = ("fisher", "collect", "peers", "gpt2")

PLAIN = "plain"
FLOOR = "floor: + per-sample products, no squaring"
FISHER = "F full"
GROUPS = "F full + mean h + group values (what collect() does)"
COLLECT = f"collect() of {BATCHES} batches to disk, F full"

Functions = dict[str, Callable[[], object]]


def passes(model: PreTrainedModel, ids: list[list[int]], parameters: str) -> Functions:
    """Passes over one batch, by name: the floors, F, and what is collected beside it."""
    batch = torch.tensor(ids)
    one = Instrumented(model, ids, parameters=parameters)
    square, mean = Squares(one.context), Squares(one.context, mean=True)
    full, groups = one.collectors(full=True), one.collectors(full=False)
    return {
        PLAIN: lambda: plain(model, batch),
        "forward + activation gradients": lambda: one.run(Nothing()),
        FLOOR: lambda: one.run(Products()),
        FISHER: lambda: one.run(square),
        "F full + mean h": lambda: one.run(mean),
        GROUPS: lambda: one.run(*full),
        "group values alone": lambda: one.run(*groups),
    }


def head_norms(model: PreTrainedModel, ids: list[list[int]]) -> Functions:
    """Norms per head of Q, K, V and O, and nothing else."""
    one = Instrumented(model, ids, parameters="attention")
    return {"norms per head alone": lambda: one.run(HeadNorms())}


def whole(model: PreTrainedModel, n: int, length: int, scratch: Path) -> Functions:
    """``collect()`` itself, with its checks and files."""
    scope = fs.wrap(model)
    rows = [{"input_ids": row} for row in token_ids(BATCHES * n, length, seed=2)]
    count = iter(range(10**6))

    def collect(*extensions: str) -> None:
        out = scratch / f"{next(count)}.fs"
        scope.collect({"a": rows}, out, extensions=extensions, batch_size=n, durability="none", quiet=True)

    return {
        COLLECT: lambda: collect("fisher"),
        f"{COLLECT}, attention gradients": lambda: collect("fisher", "sample_gradients"),
    }


def compared(model: PreTrainedModel, ids: list[list[int]], weights: list[str]) -> Functions:
    """The peers that agree with the loop over samples; what is left out is said."""
    functions: Functions = {}
    reference = None
    for name, peer in peers(model, torch.tensor(ids), weights):
        if isinstance(peer, str):
            print(f"  {name}: skipped, {peer}")
            continue
        found = peer()
        reference = reference or found
        worst = max(float((found[k] - v).norm() / v.norm()) for k, v in reference.items())
        if worst > 1e-4:
            print(f"  {name}: skipped, differs from the loop by {worst:.1e}")
            continue
        functions[name] = peer
    return functions


def measure(
    hidden: int, n: int, length: int, only: str | None, repeats: int, clock: Callable[[], float]
) -> list[Ratio]:
    """All that is asked for of one setting."""
    ids = token_ids(n, length)
    label = f"{n} samples of {length} tokens"
    rows: list[Ratio] = []
    if only != "gpt2":
        model = qwen2(hidden)
        functions = passes(model, ids, "linear")
        if only in {None, "fisher"}:
            functions |= head_norms(model, ids)
        else:
            functions = {name: functions[name] for name in (PLAIN, FLOOR, FISHER)}
        with tempfile.TemporaryDirectory() as scratch:
            if only in {None, "collect"}:
                functions |= whole(model, n, length, Path(scratch))
            if only in {None, "peers"}:
                weights = [name for name in fs.wrap(model).parameters if name.endswith("weight")]
                functions |= compared(model, ids, weights)
            seconds = interleaved(functions, repeats, clock)
        many = {name: BATCHES for name in functions if name.startswith("collect")}
        rows += ratios(f"Qwen2, hidden {hidden}, {label}", seconds, PLAIN, many)
        show(rows)
    if only in {None, "gpt2"}:
        functions = passes(gpt2(hidden), ids, "all")
        found = ratios(
            f"GPT-2, all parameters, hidden {hidden}, {label}", interleaved(functions, repeats, clock), PLAIN
        )
        show(found)
        rows += found
    return rows


def main() -> None:
    """Measure and print."""
    logging.set_verbosity_error()
    for kind in (UserWarning, FutureWarning):
        warnings.simplefilter("ignore", kind)  # peers and torch say a lot about hooks and vmap
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--setting", action="append", help="hidden,N,T; may be given several times")
    parser.add_argument("--only", choices=PARTS, help="one part of the table; all of it otherwise")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, and its processor time: a machine that others use does not lengthen it",
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.cpu_time:
        torch.set_num_threads(1)
    settings = [tuple(map(int, s.split(","))) for s in arguments.setting or []] or SETTINGS
    rows = []
    for hidden, n, length in settings:
        rows += measure(hidden, n, length, arguments.only, arguments.repeats, clock)
    if arguments.json:
        write(arguments.json, rows)


if __name__ == "__main__":
    main()
