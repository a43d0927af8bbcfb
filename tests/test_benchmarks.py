"""The benchmark scripts run, in their smallest form, and say what they should."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(script, *arguments):
    """What a script printed in a process of its own; it must succeed."""
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run_here(monkeypatch, capsys):
    """The same without a new process, which would spend seconds on imports."""
    verbosity = logging.get_verbosity()
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return capsys.readouterr().out

    yield run
    logging.set_verbosity(verbosity)
    for name in {"harness", "peers"} - before:
        sys.modules.pop(name, None)


def rows_of(path):
    """The rows of a JSON file; every number that is a ratio is finite and positive."""
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["about"]
    assert found["rows"]
    for row in found["rows"]:
        assert math.isfinite(row["ratio"])
        assert row["ratio"] > 0
    return found["rows"]


@pytest.mark.parametrize(
    "only",
    ["collect", pytest.param("fisher", marks=pytest.mark.slow), pytest.param("gpt2", marks=pytest.mark.slow)],
)
def test_collect(run_here, tmp_path, only):
    """Floors, F alone and with what collect() adds stand in one table, as multiples of plain."""
    out = tmp_path / "results.json"
    printed = run_here("collect.py", "--only", only, "--setting", "64,2,6", "--repeats", 1, "--json", out)
    rows = {row["variant"]: row for row in rows_of(out)}
    assert rows["plain"]["ratio"] == 1
    named = ["floor: ", "F full"]
    if only == "collect":
        named += ["collect() of 4 batches to disk, F full"]
    else:
        named += ["forward + activation gradients", "F full + mean h", "group values alone"]
    if only == "fisher":
        named += ["norms per head alone"]
    for name in named:
        assert any(variant.startswith(name) for variant in rows), name
        assert name in printed


@pytest.mark.slow
def test_peers(tmp_path):
    """Each peer is timed, or left out with a word; the loop and vmap need nothing but torch."""
    out = tmp_path / "results.json"
    printed = run("collect.py", "--only", "peers", "--setting", "64,2,6", "--repeats", 1, "--json", out)
    timed = {row["variant"] for row in rows_of(out)}
    assert {"loop of single samples", "torch.func vmap"} <= timed
    for peer in ("Opacus", "BackPACK SumGradSquared", "Kronfluence diagonal"):
        assert peer in timed or f"{peer}: skipped, not installed" in printed
    assert "differs from the loop" not in printed


@pytest.mark.slow
def test_memory(tmp_path):
    """Every pass is a process of its own, which has a peak."""
    out = tmp_path / "results.json"
    run("memory.py", "--smoke", "--json", out)
    rows = rows_of(out)
    assert [row["variant"] for row in rows] == [
        "plain forward+backward",
        "pass: F full + mean h + group values",
    ]
    assert all(row["peak"] > row["added"] > 0 for row in rows)


def test_gpu(run_here, tmp_path):
    """The tiny form measures every variant, and says what a fused kernel would save."""
    out = tmp_path / "results.json"
    printed = run_here("gpu.py", "--smoke", "--repeats", 1, "--json", out)
    variants = {row["variant"] for row in rows_of(out)}
    assert {
        "plain forward+backward",
        "one at a time: F + mean h + group values",
        "batched: F + mean h + group values",
        "products alone",
        "products + square + sum",
    } <= variants
    assert "x one at a time" in printed
    assert "squaring and adding take" in printed


def test_gpu_without_cuda(run_here):
    """Without CUDA nothing is measured, and it is said what would be."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    printed = run_here("gpu.py")
    assert "no CUDA device" in printed
    assert "Qwen2.5-1.5B" in printed
