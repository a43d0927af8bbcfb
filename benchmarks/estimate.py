"""How far `scope.estimate` is from what a collection of the demo then takes.

Each measurement is a process of its own, and estimates alternate with collections, so that a busy machine
slows them alike.

    python benchmarks/estimate.py [--repeats 5] [--json results.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

QUANTITIES = ("seconds", "memory", "disk")


def measure(what: str) -> None:
    """Print one measurement as JSON: an estimate, or a collection."""
    import fisherscope as fs
    from fisherscope.cli.loading import load_model, load_tokenizer
    from fisherscope.demo import model_path, task_files
    from fisherscope.instrument.memory import PeakMemory

    path = str(model_path())
    scope = fs.wrap(load_model(path, device="cpu"), load_tokenizer(path))
    if what == "estimate":
        found = scope.estimate(task_files())
        values = (found.seconds, found.memory_bytes, found.disk_bytes)
    else:
        with tempfile.TemporaryDirectory() as scratch, PeakMemory(torch.device("cpu")) as memory:
            begun = time.perf_counter()
            scope.collect(task_files(), Path(scratch) / "run.fs", quiet=True)
            seconds = time.perf_counter() - begun
            disk = sum(file.stat().st_size for file in Path(scratch).rglob("*") if file.is_file())
        values = (seconds, memory.bytes, disk)
    print(json.dumps(dict(zip(QUANTITIES, values, strict=True))))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=["estimate", "collect"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    found: dict[str, list[dict[str, float]]] = {"estimate": [], "collect": []}
    for _ in range(arguments.repeats):
        for what, values in found.items():
            command = [sys.executable, __file__, "--measure", what]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            values.append(json.loads(done.stdout.splitlines()[-1]))
    ratios = {
        name: statistics.median(row[name] for row in found["estimate"])
        / statistics.median(row[name] for row in found["collect"])
        for name in QUANTITIES
    }
    print(f"estimate / collection of the demo, medians of {arguments.repeats}")
    for name, ratio in ratios.items():
        print(f"  {name:<8} {ratio:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"ratios": ratios, "measurements": found}, indent=1))


if __name__ == "__main__":
    main()
