"""Collection on an accelerator: samples per second batched, one at a time, and against a plain pass.

Random models of the shapes of Qwen2.5-1.5B (bfloat16) and GPT-2 small, attention and MLP weights
instrumented. The share of time that a fused kernel for ``sum_n (d_n' a_n) ** 2`` could save is measured, too:
that of squaring and adding over that of the products alone. Where there is no CUDA it says what it would
measure; ``--smoke`` runs all of it on the CPU with tiny models.

    python benchmarks/gpu.py [--repeats 5] [--json results.json] [--smoke]
        [--compute-dtype bfloat16]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Instrumented, Nothing, Products, Squares, gpt2, plain, qwen2, token_ids, write
from transformers import PreTrainedModel
from transformers.utils import logging

from fisherscope.linalg import Factored

QWEN2_1_5B = {
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
GPT2_SMALL = {"n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
SHAPES = [(1536, 1536), (8960, 1536)]  # of the weights whose kernel is timed


@dataclass(frozen=True)
class Case:
    """One model and the batches that are tried."""

    name: str
    build: Callable[[], PreTrainedModel]
    samples: tuple[int, ...]
    length: int
    vocabulary: int


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
        per_second: samples per second, or 0 where something else was measured.
        ratio: the time per sample as a multiple of the plain pass at the same batch size; for kernels the
            time as a multiple of the products alone.
        peak: bytes allocated at most, 0 on a CPU.
    """

    case: str
    variant: str
    n: int
    length: int
    seconds: float
    per_second: float
    ratio: float
    peak: int


def cases(smoke: bool) -> Iterator[Case]:
    """The models, or tiny ones of the same kinds."""
    if smoke:
        yield Case("Qwen2, tiny", lambda: qwen2(64, 2), (2, 4), 8, 512)
        yield Case("GPT-2, tiny", lambda: gpt2(64, 2), (2, 4), 8, 512)
        return
    for length in (128, 256):
        yield Case("Qwen2.5-1.5B", lambda: qwen2(1536, 28, **QWEN2_1_5B), (8, 32), length, 151936)
        yield Case("GPT-2 small", lambda: gpt2(768, 12, **GPT2_SMALL), (32, 128), length, 50257)


def clock(function: Callable[[], object], repeats: int, device: torch.device) -> tuple[float, int]:
    """Median seconds of a call after a warm-up, and the peak of allocated bytes."""
    function()
    times = []
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times), torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def passes(
    case: Case, device: torch.device, dtype: torch.dtype, compute_dtype: torch.dtype, repeats: int
) -> Iterator[Row]:
    """The model's passes: plain, one sample at a time, and batched."""
    model = case.build().to(device=device, dtype=dtype)
    model.requires_grad_(True)
    for n in case.samples:
        ids = token_ids(n, case.length, vocabulary=case.vocabulary)
        batch = torch.tensor(ids, device=device)
        timed: dict[str, Callable[[], object]] = {"plain forward+backward": lambda b=batch: plain(model, b)}
        base = 0.0
        for name, count, run in (
            *((name, n, run) for name, run in timed.items()),
            *_instrumented(model, ids, compute_dtype),
        ):
            seconds, peak = clock(run, repeats, device)
            model.zero_grad(set_to_none=True)
            per_sample = seconds / count
            base = base or per_sample
            yield Row(case.name, name, n, case.length, seconds, 1 / per_sample, per_sample / base, peak)


def _instrumented(
    model: PreTrainedModel, ids: list[list[int]], compute_dtype: torch.dtype
) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Name, number of samples and function of each instrumented pass; accumulators die with their variant."""
    single = Instrumented(model, ids[:1], compute_dtype=compute_dtype)
    batched = Instrumented(model, ids, compute_dtype=compute_dtype)
    collectors = single.collectors(full=True)
    yield "one at a time: F + mean h + group values", 1, lambda: single.run(*collectors)
    collectors = batched.collectors(full=True)
    yield "batched: F + mean h + group values", len(ids), lambda: batched.run(*collectors)
    collectors = [Squares(batched.context)]
    yield "batched: F alone", len(ids), lambda: batched.run(*collectors)
    collectors = batched.collectors(full=False)
    yield "batched: group values alone", len(ids), lambda: batched.run(*collectors)
    collectors = [Products()]
    yield "batched: products alone", len(ids), lambda: batched.run(*collectors)
    collectors = [Nothing()]
    yield "batched: activation gradients alone", len(ids), lambda: batched.run(*collectors)


def kernels(
    n: int, length: int, device: torch.device, dtype: torch.dtype, repeats: int, small: bool
) -> Iterator[Row]:
    """Products alone, and with squaring and adding.

    What lies between is memory traffic, which a fused kernel saves.
    """
    for rows, columns in [(32, 16)] if small else SHAPES:
        left = torch.randn(n, length, rows, device=device, dtype=dtype)
        right = torch.randn(n, length, columns, device=device, dtype=dtype)
        gradient = Factored(left, right)
        square = torch.zeros(rows, columns, device=device)
        flat_left, flat_right = left.flatten(0, 1), right.flatten(0, 1)
        variants: dict[str, Callable[[], object]] = {
            "products alone": lambda g=gradient: _form(g),
            "products + square + sum": lambda g=gradient, s=square: g.accumulate(square=s),
            "one flat product (the mean's gradient)": lambda a=flat_left, b=flat_right: a.T @ b,
        }
        base = 0.0
        for name, run in variants.items():
            seconds, peak = clock(run, repeats, device)
            base = base or seconds
            yield Row(
                f"{str(dtype).removeprefix('torch.')} [{rows}, {columns}]",
                name,
                n,
                length,
                seconds,
                0.0,
                seconds / base,
                peak,
            )


def _form(gradient: Factored) -> None:
    for _ in gradient.tiles():
        pass


def verdict(rows: list[Row]) -> str:
    """What the kernel rows say about a fused kernel."""
    products = [r.seconds for r in rows if r.variant == "products alone"]
    both = [r.seconds for r in rows if r.variant == "products + square + sum"]
    flat = [r.seconds for r in rows if r.variant.startswith("one flat")]
    traffic = max(0.0, 1 - sum(products) / sum(both))
    saved = max(0.0, 1 - sum(flat) / sum(both))
    return (
        f"squaring and adding take {traffic:.0%} of F in {rows[0].case.split(' [')[0]}; a kernel that never "
        f"writes the products saves at most {saved:.0%}, as it then costs what one flat product costs"
    )


def main() -> None:
    """Measure and print."""
    logging.set_verbosity_error()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compute-dtype", choices=("float32", "bfloat16"), default="float32", help="of the products"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny models, on the CPU where there is no GPU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.smoke:
        print("no CUDA device: nothing is measured. On one, this compares, for models of these shapes:")
        for case in cases(smoke=False):
            sizes = " and ".join(map(str, case.samples))
            print(f"  {case.name}, {sizes} samples of {case.length} tokens, bfloat16")
        print(
            "samples per second of a plain forward+backward, of collection one sample at a time and batched, "
            "the peak of allocated memory, and what squaring costs beside the products (--smoke: tiny "
            "models, on the CPU)"
        )
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows: list[Row] = []
    for case in cases(arguments.smoke):
        for row in passes(case, device, dtype, getattr(torch, arguments.compute_dtype), arguments.repeats):
            rows.append(row)
            _print(row)
        _batched_against_single([r for r in rows if r.case == case.name and r.length == case.length])
        if device.type == "cuda":
            torch.cuda.empty_cache()
    n, length = (4, 8) if arguments.smoke else (32, 128)
    for kernel_dtype in (torch.float32, torch.bfloat16):
        found = list(kernels(n, length, device, kernel_dtype, arguments.repeats, arguments.smoke))
        for row in found:
            _print(row)
        print(verdict(found))
        rows += found
    if arguments.json:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        write(arguments.json, rows, device=name, dtype=str(dtype), compute_dtype=arguments.compute_dtype)


def _print(row: Row) -> None:
    print(
        f"{row.case:<22} {row.n:4} x {row.length:<4} {row.variant:<42} {row.seconds * 1e3:9.2f} ms "
        f"{row.per_second:9.1f} samples/s  x {row.ratio:5.2f}  {row.peak / 2**30:6.2f} GiB",
        flush=True,
    )


def _batched_against_single(rows: list[Row]) -> None:
    for n in sorted({r.n for r in rows}):
        speed = {r.variant.split(":")[0]: r.per_second for r in rows if r.n == n and "mean h" in r.variant}
        print(f"  batched {n} at a time is {speed['batched'] / speed['one at a time']:.1f} x one at a time")


if __name__ == "__main__":
    main()
