"""Peak memory of a pass and of a collection; every measurement is a process of its own.

Two claims: an instrumented pass needs little more than a plain forward+backward of the same batch, and a
collection of four times as many samples needs no more than one of the samples themselves. The peak is that
of the resident set (``VmHWM``); beside it stands what came on top of what the process had before.

    python benchmarks/memory.py [--setting 512,32,64] [--json results.json] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

TIMES = 4
BATCHES = 2
VARIANTS = {
    "plain forward+backward": ("plain", 1),
    "pass: group values": ("groups", 1),
    "pass: F full + mean h + group values": ("full", 1),
    f"collect() of {BATCHES} batches, F full": ("collect", BATCHES),
    f"collect() of {TIMES * BATCHES} batches, F full": ("collect", TIMES * BATCHES),
}


@dataclass(frozen=True)
class Peak:
    """Memory of one variant, in MiB.

    Attributes:
        peak: of the whole process.
        added: over what the process had before its first batch, model included.
        ratio: peak over that of the plain pass; for a longer collection over that of the shorter one.
        added_ratio: the same of what was added.
    """

    variant: str
    peak: float
    added: float
    ratio: float
    added_ratio: float


def peak_mib() -> float:
    """The most memory that this process has ever had resident."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1 << 20) if sys.platform == "darwin" else used / 1024


def child(what: str, batches: int, hidden: int, n: int, length: int) -> None:
    """Do one thing once or twice, and print the peaks before and after."""
    import torch
    from harness import Instrumented, plain, qwen2, token_ids
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = qwen2(hidden)
    ids = token_ids(n * batches, length)
    if what == "plain":
        for p in model.parameters():
            p.grad = torch.zeros_like(p)  # as an optimiser would find them in the next step
        batch = torch.tensor(ids)
        # a first small batch loads what is loaded lazily, for every variant alike
        plain(model, batch[:1])
        before = peak_mib()
        for _ in range(3):
            plain(model, batch)
    elif what == "collect":
        import fisherscope as fs

        scope = fs.wrap(model)
        before = peak_mib()
        with tempfile.TemporaryDirectory() as scratch:
            rows = [{"input_ids": row} for row in ids]
            out = Path(scratch) / "a.fs"
            scope.collect(
                {"a": rows}, out, extensions=("fisher",), batch_size=n, durability="none", quiet=True
            )
    else:
        small = Instrumented(model, ids[:1])
        small.run(*small.collectors(full=False))
        one = Instrumented(model, ids)
        before = peak_mib()
        collectors = one.collectors(full=what == "full")
        for _ in range(3):
            one.run(*collectors)
    print(json.dumps({"before": before, "peak": peak_mib()}))


def measured(what: str, batches: int, setting: tuple[int, int, int]) -> dict[str, float]:
    """Peaks of a fresh process."""
    command = [sys.executable, __file__, "--child", what, str(batches), *map(str, setting)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--child"]:
        batches, hidden, n, length = map(int, sys.argv[3:])
        child(sys.argv[2], batches, hidden, n, length)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", default="512,32,64", help="hidden,N,T")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, and the passes alone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    hidden, n, length = map(int, ("64,4,16" if arguments.smoke else arguments.setting).split(","))
    chosen = {k: v for k, v in VARIANTS.items() if not (arguments.smoke and v[0] in {"groups", "collect"})}
    rows: list[Peak] = []
    print(f"Qwen2, 4 layers, hidden {hidden}, {n} samples of {length} tokens per batch; MiB")
    print(f"  {'':<46} peak   added   x (peak)  x (added)")
    for name, (what, batches) in chosen.items():
        peaks = measured(what, batches, (hidden, n, length))
        added = peaks["peak"] - peaks["before"]
        base = rows[-1] if batches > BATCHES else (rows[0] if rows else None)
        ratio, added_ratio = (peaks["peak"] / base.peak, added / max(base.added, 1)) if base else (1.0, 1.0)
        rows.append(Peak(name, peaks["peak"], added, ratio, added_ratio))
        print(f"  {name:<46} {rows[-1].peak:6.0f} {added:6.0f} {ratio:9.3f} {added_ratio:9.2f}", flush=True)
    if arguments.json:
        about = {"hidden": hidden, "n": n, "T": length}
        found = {"about": about, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
