"""What the store costs: sealing, reading, collecting into it, opening it; ratios from one run.

Each is compared with the least that could be done in its place, interleaved so that a busy machine slows both
alike; printed are medians and quartiles, and the bar that the project sets itself.

* sealing shards of 64 MB (checksums, sync, rename, journal) against a raw write and sync of the same bytes,
  as speeds: on a disk and on tmpfs
* reading one head of all samples against ``np.memmap`` at the same offsets with the same conversion: when it
  is first touched (the checksums of its blocks are compared then), and again
* collecting with the gradients of every sample stored against without, on tmpfs: the demo's model
* opening a store of 10,000 shards, in seconds

    python benchmarks/store.py [--repeats 7] [--disk DIR] [--tmpfs DIR] [--json results.json] [--smoke]
        [--only seal|read|collect|open]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from bars import Row, row, show
from harness import interleaved, write
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import fisherscope as fs
from fisherscope import demo
from fisherscope.layout import AttentionLayout, HeadBlock, ModelLayout, ParameterInfo, Partition
from fisherscope.store import ContributionStore, StoreHeader, StoreWriter, open_store
from fisherscope.store.journal import Line, decode_line, encode_line
from fisherscope.store.records import shard_name

PARTS = ("seal", "read", "collect", "open")
TASK = "a"


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    width: int = 768
    heads: int = 12
    layers: int = 7
    samples: int = 2
    shards: int = 6
    opened: int = 10_000
    opened_layers: int = 28
    rows: int = 64


SMOKE = Size(width=64, heads=2, layers=2, samples=4, shards=2, opened=50, opened_layers=3, rows=12)


def compare(
    setting: str,
    seconds: Mapping[str, list[float]],
    base: str,
    bar: Mapping[str, float],
    *,
    speed: bool = False,
) -> list[Row]:
    """Each variant's times over those of ``base`` in the same round; as speeds the other way round."""
    rows = []
    for name in [name for name in seconds if name != base]:
        pairs = list(zip(seconds[name], seconds[base], strict=True))
        each = [b / t if speed else t / b for t, b in pairs]
        rows.append(row(setting, name, each, **bar))
    return rows


def layout_of(layers: int, heads: int, width: int, head_dim: int) -> ModelLayout:
    """Q, K, V and O of some layers, without biases."""
    infos, attention = [], []
    for layer in range(layers):
        blocks = []
        for name in "QKVO":
            parameter = f"layers.{layer}.{name.lower()}_proj.weight"
            shape = (width, heads * head_dim) if name == "O" else (heads * head_dim, width)
            infos.append(ParameterInfo(parameter, shape, "attention", layer))
            axis = int(name == "O")
            blocks.append(HeadBlock(name, Partition.regular(parameter, shape, axis, heads, head_dim)))
        module = f"layers.{layer}"
        attention.append(AttentionLayout(layer, module, f"{module}.o_proj", heads, heads, tuple(blocks)))
    return ModelLayout("benchmark", tuple(infos), tuple(attention))


def header_of(layout: ModelLayout) -> StoreHeader:
    """A store of the gradients of every parameter, in bfloat16."""
    names = tuple(info.name for info in layout.parameters)
    return StoreHeader(fingerprint={"run": 0}, layout=layout, parameters=names, gradient_parameters=names)


def put_segment(writer: StoreWriter, rows: list[int], gradients: Mapping[str, Tensor]) -> None:
    """One segment of random samples; the gradients are in the type of the store already."""
    n, groups = len(rows), len(writer.header.groups)
    with writer.segment(TASK, rows) as segment:
        for name in ("length", "tokens", "truncated", "loss"):
            segment.put(f"sample/{name}", 0, [1] * n)
        for name in ("square", "dot"):
            segment.put(f"groups/{name}", 0, np.zeros((n, groups), dtype=np.float32))
        for name, values in gradients.items():
            segment.put_gradient(name, 0, values)
        segment.commit()


def random_gradients(header: StoreHeader, n: int) -> dict[str, Tensor]:
    """Random numbers for every parameter of some samples, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shapes = {info.name: info.shape for info in header.layout.parameters}
    return {k: torch.randn(n, *s, generator=generator).bfloat16() for k, s in shapes.items()}


def sealing(size: Size, place: str, directory: Path, repeats: int) -> list[Row]:
    """Shards with everything that a commit does, and the same bytes written and synced."""
    head_dim = size.width // size.heads
    header = header_of(layout_of(size.layers, size.heads, size.width, head_dim))
    gradients = random_gradients(header, size.samples)
    payload = b"".join(values.view(torch.int16).numpy().tobytes() for values in gradients.values())
    keys = [str(i) for i in range(size.samples * size.shards)]

    def stored(queue: int) -> float:
        root = directory / "run.fs"
        with StoreWriter.open(root, header, durability="power", queue=queue) as writer:
            writer.declare_task(TASK, keys)
            begun = time.perf_counter()
            for shard in range(size.shards):
                first = shard * size.samples
                put_segment(writer, list(range(first, first + size.samples)), gradients)
            writer.flush()
            taken = time.perf_counter() - begun
        shutil.rmtree(root)
        return taken

    def raw() -> float:
        root = directory / "raw"
        root.mkdir()
        begun = time.perf_counter()
        for shard in range(size.shards):
            fd = os.open(root / str(shard), os.O_CREAT | os.O_WRONLY, 0o644)
            os.posix_fallocate(fd, 0, len(payload))
            view = memoryview(payload)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
            os.close(fd)
        taken = time.perf_counter() - begun
        shutil.rmtree(root)
        return taken

    functions = {
        "raw": raw,
        "sealed by a thread, queue of 2": lambda: stored(2),
        "sealed at once": lambda: stored(0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            taken = function()
            seconds[name] += [taken] if repeat else []
    setting = f"sealing {size.shards} shards of {len(payload) / 1e6:.0f} MB on {place}, speed"
    return compare(setting, seconds, "raw", {"least": 0.8}, speed=True)


def reading(size: Size, directory: Path, repeats: int) -> list[Row]:
    """One head of all samples: through the store, and through maps of the same bytes."""
    head_dim = size.width // size.heads
    header = header_of(layout_of(1, size.heads, size.width, head_dim))
    gradients = random_gradients(header, 8 * size.samples)
    root, n = directory / "read.fs", 8 * size.samples
    with StoreWriter.open(root, header, durability="none") as writer:
        writer.declare_task(TASK, [str(i) for i in range(size.shards * n)])
        for shard in range(size.shards):
            put_segment(writer, list(range(shard * n, (shard + 1) * n)), gradients)
    store, head = open_store(root), size.heads // 2
    places = [
        (
            root / "shards" / s.shard.file,
            next(d for d in s.shard.datasets if d.name == "gradients/decoder/0/Q"),
        )
        for s in store.task_index(TASK).segments
    ]
    maps = [np.memmap(file, np.uint16, "r", d.offset, d.spec.shape) for file, d in places]
    expected = torch.cat([mapped(values, head) for values in maps])
    assert torch.equal(expected, store.slice(TASK, layer=0, block="Q", head=head))

    def by_map(again: bool) -> None:
        out = torch.empty(expected.shape)
        for number, (file, d) in enumerate(places):
            values = maps[number] if again else np.memmap(file, np.uint16, "r", d.offset, d.spec.shape)
            out[number * n : (number + 1) * n] = mapped(values, head)

    fresh: list[ContributionStore] = []

    def first_touch() -> None:
        fresh.pop().slice(TASK, layer=0, block="Q", head=head)

    fresh.extend(open_store(root) for _ in range(repeats + 1))
    mb = expected.numel() * 2 / 1e6
    rows = []
    for when, base, ours in (
        ("first touch, checksums compared", lambda: by_map(False), first_touch),
        ("again", lambda: by_map(True), lambda: store.slice(TASK, layer=0, block="Q", head=head)),
    ):
        seconds = interleaved({"np.memmap": base, when: ours}, repeats)
        setting = f"one head of {size.shards * n} samples ({mb:.1f} MB), time"
        rows += compare(setting, seconds, "np.memmap", {"most": 1.2})
    return rows


def mapped(values: np.ndarray, head: int) -> Tensor:
    """A head of mapped bfloat16, ``[n, columns]`` in float32, as the store gives it."""
    return torch.from_numpy(np.array(values[head]).view(np.int16)).view(torch.bfloat16).float()


def collecting(size: Size, directory: Path, repeats: int) -> list[Row]:
    """The same collection with and without the gradients of every sample."""
    path = demo.model_path()
    scope = fs.wrap(AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path))
    lines = demo.task_files()["math"].read_text(encoding="utf-8").splitlines()
    tasks = {TASK: [json.loads(line) for line in lines[: size.rows]]}

    def collect(*extensions: object) -> None:
        root = directory / "collected.fs"
        scope.collect(tasks, root, extensions=("fisher", *extensions), batch_size=16, quiet=True)
        shutil.rmtree(root)

    functions: dict[str, Callable[[], object]] = {
        "without": collect,
        "attention gradients": lambda: collect("sample_gradients"),
        "attention gradients, dense": lambda: collect(fs.SampleGradients(encoding="dense")),
    }
    setting = f"collecting {len(tasks[TASK])} samples with the demo's model on tmpfs, time"
    return compare(setting, interleaved(functions, repeats), "without", {"most": 1.3})


def opening(size: Size, directory: Path, repeats: int) -> list[Row]:
    """A store of many shards: one real line of a journal, repeated with other rows."""
    header, n = header_of(layout_of(size.opened_layers, 2, 8, 4)), 4
    root = directory / "many.fs"
    with StoreWriter.open(root, header, durability="none") as writer:
        writer.declare_task(TASK, [f"{i:032x}" for i in range(n * size.opened)])
        put_segment(writer, list(range(n)), random_gradients(header, n))
    journal = root / "journal" / "r0000.journal"
    *start, last = journal.read_bytes().splitlines()
    line = decode_line(last)
    assert line is not None
    with journal.open("ab") as file:
        for shard in range(1, size.opened):
            sequence = len(start) + shard
            rows = list(range(shard * n, (shard + 1) * n))
            record = {**line.record, "seq": sequence, "rows": rows, "shard": shard_name(0, sequence)}
            file.write(encode_line(Line(record, line.table)))
    datasets = len(open_store(root).task_index(TASK).segments[0].shard.datasets)
    seconds = interleaved({"open": lambda: open_store(root)}, repeats)["open"]
    mb = journal.stat().st_size / 1e6
    setting = f"opening {size.opened} shards of {datasets} datasets ({mb:.0f} MB), seconds"
    return [row(setting, "open_store", seconds, most=1.0)]


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A directory that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=parent) as path:
        yield Path(path)


def main() -> None:
    """Measure and print."""
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", UserWarning)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="on a real disk")
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"), help="in memory")
    parser.add_argument("--only", choices=PARTS, help="one part; all otherwise")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    size = SMOKE if arguments.smoke else Size()
    repeats = arguments.repeats
    parts: dict[str, list[Callable[[], list[Row]]]] = {}

    def on(parent: Path, measure: Callable[[Path], list[Row]]) -> Callable[[], list[Row]]:
        def measured() -> list[Row]:
            with scratch(parent) as directory:
                return measure(directory)

        return measured

    parts["seal"] = [
        on(arguments.disk, lambda d: sealing(size, "disk", d, repeats)),
        on(arguments.tmpfs, lambda d: sealing(size, "tmpfs", d, repeats)),
    ]
    many = replace(size, shards=8 * size.samples)
    parts["read"] = [on(arguments.tmpfs, lambda d: reading(many, d, repeats))]
    parts["collect"] = [on(arguments.tmpfs, lambda d: collecting(size, d, repeats))]
    parts["open"] = [on(arguments.tmpfs, lambda d: opening(size, d, repeats))]
    rows: list[Row] = []
    for name, measures in parts.items():
        if arguments.only in {None, name}:
            found = [row for measure in measures for row in measure()]
            show(found)
            rows += found
    if arguments.json:
        write(arguments.json, rows)


if __name__ == "__main__":
    main()
