"""What a collection will take, against what it then takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fisherscope as fs
from fisherscope.demo import model_path, task_files
from fisherscope.instrument.estimate import show_bytes, show_seconds
from tests import models

EVERYTHING = (
    fs.Fisher(labels=("data", "sampled")),
    fs.SampleGradients(),
    fs.Kronecker(),
    fs.Positions(),
    fs.ExactPerToken(),
)


def on_disk(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("extensions", [EVERYTHING, ("fisher",), ()], ids=["everything", "fisher", "groups"])
def test_disk_and_accumulators_are_what_is_then_written(
    extensions: tuple[object, ...], tmp_path: Path
) -> None:
    """Bytes of samples within 5 %, of accumulators within 2 %; the estimate leaves nothing behind."""
    scope = fs.wrap(models.build(models.named("llama")))
    tasks = {"a": models.rows(24), "b": models.rows(9, seed=1)}
    weights = {name: p.clone() for name, p in scope.model.named_parameters()}
    found = scope.estimate(tasks, extensions=extensions, directory=tmp_path)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(weights[name], p) for name, p in scope.model.named_parameters())
    store = scope.collect(tasks, tmp_path / "run.fs", extensions=extensions, quiet=True)
    per_sample = sum(
        dataset.spec.nbytes
        for ledger in store.ledgers
        for segments in ledger.segments.values()
        for segment in segments.values()
        for dataset in segment.shard.datasets
    )
    assert found.bytes_per_sample * 33 == pytest.approx(per_sample, rel=0.05)
    ledger = store.ledgers[0]
    snapshots = [sum(d.spec.nbytes for d in record.shard.datasets) for record in ledger.snapshots.values()]
    assert found.accumulator_bytes == pytest.approx(max(snapshots), rel=0.02)
    assert found.seconds is not None
    assert found.seconds > 0


def test_sizes_alone(tmp_path: Path) -> None:
    """Without measuring there is no time; what a user's batch size takes is not guessed."""
    scope = fs.wrap(models.build(models.named("llama")))
    found = scope.estimate({"a": models.rows(9)}, measure=False)
    assert found.seconds is None
    assert found.memory_bytes > found.accumulator_bytes
    assert scope.estimate({"a": models.rows(9)}, measure=False, batch_size=2).memory_bytes == 0
    assert "GiB" in show_bytes(3 << 30)
    assert [show_seconds(s) for s in (3.14, 45, 600, 11_100)] == ["3.1 s", "45 s", "10 min", "3 h 05 min"]
    assert "on disk" in str(found)


MEASURED = """
import os, tempfile, torch
import fisherscope as fs
from fisherscope.cli.loading import load_model, load_tokenizer
from fisherscope.demo import model_path, task_files
from fisherscope.instrument.memory import PeakMemory

path = str(model_path())
scope = fs.wrap(load_model(path, device="cpu"), load_tokenizer(path))
tasks = {"math": task_files()["math"]}
if not os.fork():
    print(scope.estimate(tasks).memory_bytes, flush=True)
    os._exit(0)
assert os.wait()[1] == 0
with tempfile.TemporaryDirectory() as scratch, PeakMemory(torch.device("cpu")) as memory:
    scope.collect(tasks, scratch + "/run.fs", quiet=True)
print(memory.bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be read on Linux only")
def test_memory_of_the_demo() -> None:
    """Within 25 % of the peak of a run over one task, each in a process of its own."""
    assert model_path().is_dir()
    assert task_files()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True, timeout=200
    )
    estimated, collected = map(int, done.stdout.split()[-2:])
    assert estimated == pytest.approx(collected, rel=0.25)


def test_an_estimate_says_what_it_does(tmp_path, capsys):
    """Each step when it begins, on stderr; nothing with quiet."""
    scope = fs.wrap(models.build(models.named("llama")))
    scope.estimate({"math": models.rows(3)}, batch_size=2)
    assert capsys.readouterr().err.splitlines() == [
        "estimate: reading the tasks and planning batches",
        "estimate: hashing the weights of the model",
        "estimate: running some of 2 batches, the largest among them",
    ]
    scope.estimate({"math": models.rows(3)}, batch_size=2, quiet=True)
    assert capsys.readouterr().err == ""
