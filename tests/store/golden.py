"""What the golden store of format version 1 holds: numbers from a formula, not from a random generator.

``python -m tests.store.golden`` wrote ``tests/store/golden-v1.fs`` when the format was settled. It is never
written again: what a later release cannot read of it is a change of the format.
"""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch

from fisherscope.linalg import Dense, LowRank
from fisherscope.linalg.rounding import rounded
from fisherscope.store import StoreHeader, StoreWriter, finalize
from fisherscope.store.encodings import Encodings
from tests.store.store_cases import small_layout

ROOT = Path(__file__).parent / "golden-v1.fs"

Q, K, V, O = (f"h.0.{name}.weight" for name in "qkvo")  # noqa: E741
TASKS = {"math": 5, "code é": 3}
LENGTHS = {"math": (2, 1, 3, 2, 4), "code é": (1, 3, 2)}
RANK = 2


def numbers(name, *shape):
    """Multiples of 1/64 between -8 and 8, which every stored type holds; the same for ever."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    places = np.arange(int(np.prod(shape)), dtype=np.uint64)
    mixed = (places * np.uint64(2654435761) + np.uint64(seed)) % np.uint64(1 << 32)
    small = (mixed >> np.uint64(25)).astype(np.int64) - 64  # -64 .. 63
    return torch.from_numpy(small.reshape(shape) / 8.0).float()


def header():
    """Q and K factored with one input, O in low rank, V and the biases as they are; all in float16."""
    layout = small_layout()
    names = tuple(info.name for info in layout.parameters)
    return StoreHeader(
        fingerprint={"weights": "golden", "nested": {"seed": 1}},
        layout=layout,
        parameters=names,
        gradient_parameters=names,
        gradient_dtype="bfloat16",
        encodings=Encodings({Q: "factored", K: "factored", O: "lowrank"}, {Q: Q, K: Q}, (), RANK, "float16"),
        position_parameters=(Q,),
        options={"batch_rows": 2, "batch_positions": None},
        provenance={"fisherscope": "golden"},
    )


def key(task, row):
    """Of a sample."""
    return hashlib.sha256(f"{task}/{row}".encode()).hexdigest()[:32]


def gradient(task, parameter, row):
    """g of one sample, exact; of O it has the rank that is kept."""
    shape = small_layout().parameter(parameter).shape
    positions = LENGTHS[task][row]
    if parameter in {Q, K}:
        d = numbers(f"{task} {parameter} {row}", positions, shape[0])
        return d.T @ numbers(f"{task} input {row}", positions, shape[1])
    if parameter == O:
        left, right = (
            numbers(f"{task} {side} {row}", RANK, size) for side, size in zip("lr", shape, strict=True)
        )
        return left.T @ right
    return numbers(f"{task} {parameter} {row}", *shape)


def put(segment, task, rows):
    """Everything that is known of some samples."""
    groups = len(header().groups)
    lengths = [LENGTHS[task][row] for row in rows]
    segment.put("sample/length", 0, lengths)
    segment.put("sample/tokens", 0, [row + 1 for row in rows])
    segment.put("sample/loss", 0, [row / 4 for row in rows])
    segment.put("sample/truncated", 0, [row % 2 for row in rows])
    segment.put("ids/input", 0, [list(range(row, row + LENGTHS[task][row])) for row in rows])
    segment.put("labels/ids", 0, [[-100] * LENGTHS[task][row] for row in rows])
    segment.put("text/bytes", 0, [f"{task} {row}".encode() for row in rows])
    segment.put("groups/square", 0, torch.stack([numbers(f"{task} s {row}", groups).abs() for row in rows]))
    segment.put("groups/dot", 0, torch.stack([numbers(f"{task} d {row}", groups) for row in rows]))
    place = header().positions.datasets[Q]
    values = [numbers(f"{task} p {row}", LENGTHS[task][row], place.columns) for row in rows]
    segment.put_ragged(place.name, 0, values)
    for name in header().gradient_parameters:
        if name in {Q, K}:
            d = [
                numbers(f"{task} {name} {row}", LENGTHS[task][row], small_layout().parameter(name).shape[0])
                for row in rows
            ]
            segment.gradients.put_output(name, 0, torch.cat(d))
        elif name == O:
            g = Dense(torch.stack([gradient(task, name, row) for row in rows]))
            segment.gradients.put_low_rank(name, 0, LowRank.of(g, RANK, lambda v: rounded(v, "float16", 1)))
        else:
            segment.put_gradient(name, 0, torch.stack([gradient(task, name, row) for row in rows]))
    inputs = [
        numbers(f"{task} input {row}", LENGTHS[task][row], small_layout().parameter(Q).shape[1])
        for row in rows
    ]
    segment.gradients.put_input(Q, 0, torch.cat(inputs))


def arrays(task, rows):
    """Aggregates over some samples."""
    layout = small_layout()
    found = {}
    for info in layout.parameters:
        g = torch.stack([gradient(task, info.name, row) for row in rows])
        found |= {f"fisher/data/{info.name}": g.square().sum(0), f"mean/{info.name}": g.sum(0)}
    square = torch.stack([numbers(f"{task} s {row}", len(header().groups)).abs() for row in rows]).double()
    mean = square.mean(0)
    moments = {"count": torch.tensor([len(rows)]), "mean": mean, "m2": (square - mean).square().sum(0)}
    return found | {f"moments/{name}": values for name, values in moments.items()}


def write(root):
    """Two ranks, a task that is extended, shards that are merged, and ones that came afterwards."""
    keys = {task: [key(task, row) for row in range(n)] for task, n in TASKS.items()}
    shares = {0: [("math", [[1, 0], [2]], 3), ("code é", [[2, 0], [1]], 3)], 1: [("math", [[4, 3]], 5)]}
    for rank, tasks in shares.items():
        with StoreWriter.open(root, header(), rank=rank, world_size=2) as writer:
            writer.constants({"groups/theta_square": numbers("theta", len(header().groups)).double().abs()})
            for task, batches, n in tasks:
                writer.declare_task(task, keys[task][:n])
                for rows in batches:
                    lengths = [LENGTHS[task][row] for row in rows]
                    text = [len(f"{task} {row}".encode()) for row in rows]
                    ragged = {"ids": lengths, "labels": lengths, "positions": lengths, "text": text}
                    segment = writer.segment(task, rows, ragged=ragged)
                    put(segment, task, rows)
                    segment.commit()
                done = [row for rows in batches for row in rows]
                first = 2 * rank  # batches of the math task are 0 and 1 for rank 0, 2 for rank 1
                writer.snapshot(task, range(first, first + len(batches)), len(done), arrays(task, done))
        if rank == 0:
            finalize(root)
    return root


if __name__ == "__main__":
    shutil.rmtree(ROOT, ignore_errors=True)
    write(ROOT)
