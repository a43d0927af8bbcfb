"""What proving batches costs, and how small an error of one sample it sees.

Cost: runs of many batches of a 4-layer Qwen2 with ``check="auto"``, ``"every"`` and ``"off"``, in turn;
printed are ratios of one run. Sensitivity: clean batches of several families in float32 and bfloat16, all of
them proved: how many runs are refused (none should be), the largest deviation as a share of what is taken
for rounding, and the smallest relative error of one sample's gradient that would have been seen.

    python benchmarks/proofs.py [--repeats 5] [--batches 200] [--clean 500] [--only cost|clean]
        [--cpu-time] [--smoke] [--json results.json]
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from bars import Row, row, show
from harness import interleaved, qwen2, token_ids, write
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.utils import logging

import fisherscope as fs
from fisherscope.errors import CoverageError

FAMILIES = (
    *("llama", "gpt2", "qwen2", "opt", "bloom"),
    *("gemma", "gpt_neox", "falcon", "phi3", "mixtral"),
)
ROWS = 4  # samples of a batch in the runs of clean batches
LENGTHS = (4, 12)


@dataclass(frozen=True)
class Clean:
    """Clean batches of one family and dtype.

    Attributes:
        batches: how many were proved.
        refused: how many runs were refused.
        largest: the largest deviation as a share of its tolerance.
        seen: the smallest relative error of one sample's gradient that would have been seen.
    """

    family: str
    dtype: str
    batches: int
    refused: int
    largest: float
    seen: float


def collecting(model: PreTrainedModel, rows: list[Any], size: int, check: str) -> Callable[[], object]:
    """A whole ``collect()`` with its files; nothing but the check differs between variants."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            fs.wrap(model).collect(
                {"a": rows},
                Path(scratch) / "run.fs",
                batch_size=size,
                extensions=["fisher"],
                durability="none",
                check=check,  # type: ignore[arg-type]
                quiet=True,
            )

    return run


def cost(batches: int, repeats: int, clock: Callable[[], float], hidden: int = 128) -> list[Row]:
    """Ratios to the same run without proofs."""
    model, size = qwen2(hidden), 8
    generator = torch.Generator().manual_seed(0)
    ids = token_ids(batches * size, 48)
    lengths = torch.randint(24, 49, (len(ids),), generator=generator).tolist()
    rows = [{"input_ids": row[:length]} for row, length in zip(ids, lengths, strict=True)]
    variants = ("off", "auto", "every")
    seconds = interleaved({name: collecting(model, rows, size, name) for name in variants}, repeats, clock)
    setting = f"{batches} batches of {size} samples, up to 48 tokens, hidden {hidden}"

    def over(name: str) -> list[float]:
        return [t / base for t, base in zip(seconds[name], seconds["off"], strict=True)]

    return [
        row(setting, 'check="auto" over check="off"', over("auto"), most=1.03),
        row(setting, 'check="every" over check="off"', over("every")),
    ]


def clean(family: str, dtype: torch.dtype, batches: int, seed: int = 0) -> Clean:
    """Prove clean batches of one tiny random model, all parameters."""
    config = tiny.tiny_config(CONFIG_MAPPING[family])
    model = tiny.random_model(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(*LENGTHS, (batches * ROWS,), generator=generator).tolist()
    rows = [
        {"input_ids": torch.randint(3, tiny.VOCABULARY, (n,), generator=generator).tolist()} for n in lengths
    ]
    name = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            store = fs.wrap(model, parameters="all").collect(
                {"a": rows},
                Path(scratch) / "run.fs",
                batch_size=ROWS,
                extensions=[fs.Fisher(shape="groups")],
                durability="none",
                check="every",
                quiet=True,
            )
        except CoverageError as error:
            print(f"  {family} {name}: {error}")
            return Clean(family, name, 0, 1, 0.0, 0.0)
    found = store.proofs()["a"]
    share = found["largest_deviation"] / found["tolerance"]
    return Clean(family, name, found["proved"], 0, share, found["smallest_error_seen"])


def show_clean(found: list[Clean]) -> None:
    """Print what the clean batches came to."""
    print(f"\n{sum(c.batches for c in found)} clean batches, {sum(c.refused for c in found)} runs refused")
    print("  family     dtype     batches  largest deviation / tolerance  error of one sample that is seen")
    for c in found:
        print(f"  {c.family:<10} {c.dtype:<9} {c.batches:>7}  {c.largest:>29.2f}  {100 * c.seen:>30.2g} %")


def main() -> None:
    """Measure, print, and write JSON where it is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=200, help="of the runs whose cost is measured")
    parser.add_argument("--clean", type=int, default=500, help="clean batches in all")
    parser.add_argument("--only", choices=("cost", "clean"))
    parser.add_argument("--cpu-time", action="store_true", help="time of the process, not of the clock")
    parser.add_argument("--smoke", action="store_true", help="a run that shows that the script works")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    rows: list[Row] = []
    found: list[Clean] = []
    if args.only != "clean":
        clock = time.process_time if args.cpu_time else time.perf_counter
        rows = cost(6, 1, clock, 64) if args.smoke else cost(args.batches, args.repeats, clock)
        show(rows)
    if args.only != "cost":
        families = FAMILIES[:2] if args.smoke else FAMILIES
        dtypes = (torch.float32, torch.bfloat16)
        each = 2 if args.smoke else -(-args.clean // (len(families) * len(dtypes)))
        found = [clean(family, dtype, each) for family in families for dtype in dtypes]
        show_clean(found)
    if args.json:
        write(args.json, [*rows, *found])


if __name__ == "__main__":
    main()
