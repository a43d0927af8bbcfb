"""Reading takes its result and little more: shown by what happens when there is no more."""

import subprocess
import sys

import pytest
import torch

from fisherscope.layout import AttentionLayout, HeadBlock, ModelLayout, ParameterInfo, Partition
from fisherscope.linalg import LowRank
from fisherscope.store import StoreHeader, StoreWriter
from fisherscope.store.encodings import Encodings

WIDTH = 1536
SAMPLES = 24
POSITIONS = 40
NAMES = {
    "dense": "h.0.q.weight",
    "factored": "h.0.k.weight",
    "lowrank": "h.0.v.weight",
    "whole": "h.0.up.weight",
}

READ = """
import itertools, resource, sys, torch
import fisherscope.store as store

torch.set_num_threads(1)
opened = store.open_store(sys.argv[1], memory_budget="8GB")
soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
orders = (slice(0, 24), [*range(23, -1, -2), *range(0, 24, 2)])
for name, whole, samples in itertools.product(sys.argv[2:], (True, False), orders):
    def read(samples):
        if whole:
            return opened.gradients("math", name, samples)
        return opened.slices("math", layer=0, block=name[4].upper(), samples=samples)

    if not whole and len(name[4:].split(".")[0]) > 1:
        continue  # no heads
    read(slice(0, 1))  # libraries allocate on first use
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    size = 24 * 1536 * 1536 * 4
    room = int(status["VmData"].split()[0]) * 1024 + size + (64 << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (room, hard))
    found = read(samples)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    assert found.numel() * 4 == size, found.shape
    del found
    print(name, whole, samples)
"""


def _header(dtype):
    square = (WIDTH, WIDTH)
    infos = [ParameterInfo(name, square, "attention", 0) for name in list(NAMES.values())[:3]]
    infos.append(ParameterInfo(NAMES["whole"], square, "mlp", 0))
    blocks = tuple(
        HeadBlock(block, Partition.regular(info.name, square, 0, 12, 128))
        for block, info in zip("QKV", infos, strict=False)
    )
    layout = ModelLayout("wide", tuple(infos), (AttentionLayout(0, "h.0", "h.0.o", 12, 12, blocks),))
    names = tuple(NAMES.values())
    factored, low = NAMES["factored"], NAMES["lowrank"]
    encodings = Encodings({factored: "factored", low: "lowrank"}, {factored: factored}, (), 4, dtype)
    return StoreHeader({}, layout, names, names, dtype, encodings)


@pytest.fixture(scope="module", params=["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def wide(request, tmp_path_factory):
    """A store whose parameters have 9 MiB of float32 per sample."""
    root = tmp_path_factory.mktemp("wide") / "run.fs"
    header = _header(request.param)
    groups = len(header.groups)
    with StoreWriter.open(root, header, durability="none") as writer:
        writer.declare_task("math", [f"{row:032d}" for row in range(SAMPLES)])
        with writer.segment("math", range(SAMPLES), ragged={"ids": [POSITIONS] * SAMPLES}) as segment:
            for name in ("tokens", "length", "truncated", "loss"):
                segment.put(f"sample/{name}", 0, [1] * SAMPLES)
            segment.put("ids/input", 0, [[1] * POSITIONS] * SAMPLES)
            for name in ("square", "dot"):
                segment.put(f"groups/{name}", 0, torch.zeros(SAMPLES, groups))
            for row in range(SAMPLES):
                for kind in ("dense", "whole"):
                    segment.put_gradient(NAMES[kind], row, torch.randn(1, WIDTH, WIDTH))
            rows = torch.randn(SAMPLES * POSITIONS, WIDTH)
            segment.gradients.put_input(NAMES["factored"], 0, rows)
            segment.gradients.put_output(NAMES["factored"], 0, rows)
            low = torch.randn(SAMPLES, 4, WIDTH)
            segment.gradients.put_low_rank(NAMES["lowrank"], 0, LowRank(low, low, torch.zeros(SAMPLES)))
            segment.commit()
    return root


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
def test_working_memory_is_64_mib_at_most(wide):
    """With room for the result and 64 MiB, 216 MiB of gradients are read, in every encoding and order."""
    arguments = [sys.executable, "-c", READ, str(wide), *NAMES.values()]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-800:] + done.stderr[-3000:]
    assert done.stdout.count("True") == 8
    assert done.stdout.count("False") == 6
