"""``fisherscope demo``: from nothing to a report."""

import json
import os
import resource
import subprocess
import sys

import pytest

import fisherscope as fs
from fisherscope.demo import planted_pairs, task_files


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The directory that the demo wrote, what it printed, and the most memory it had, in bytes."""
    path = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "fisherscope", "demo", "--out", str(path)]
    shown = subprocess.run(
        command, env={**os.environ, "COLUMNS": "120"}, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    # the largest of all children so far, so that it can only be too strict
    return path, shown, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def test_report_is_the_last_line(made):
    """The page to open, so that it is not searched for."""
    path, shown, _ = made
    assert shown.stdout.splitlines()[-1] == str(path / "report" / "report.html")
    page = (path / "report" / "report.html").read_text(encoding="utf-8")
    assert len(page) < 10_000_000
    assert "math_flipped" in page


def test_memory(made):
    """At most 2 GiB, so that it runs on a laptop."""
    _, _, peak = made
    assert peak < 2 << 30


def test_the_planted_conflict_is_at_the_top(made):
    """Most of the ten most opposed pairs of the contradicting tasks are planted; by chance none would be."""
    path, _, _ = made
    report = fs.analyze(path / "run.fs", ["conflict"])
    top = report["conflict"].top(100)
    top = top[top["sample_a"].str.startswith("math_") & top["sample_b"].str.startswith("math_flipped_")]
    found = list(zip(top["sample_a"], top["sample_b"], strict=True))[:10]
    assert len(set(found) & set(planted_pairs())) >= 8


def test_every_sample_and_every_analysis(made):
    """192 samples of each of three tasks, and no analysis failed or was skipped."""
    path, shown, _ = made
    store = fs.open_store(path / "run.fs")
    assert store.tasks == list(task_files())
    assert [store.n(task) for task in store.tasks] == [192] * 3
    results = json.loads((path / "report" / "results.json").read_text(encoding="utf-8"))
    assert results
    assert "failed" not in shown.stdout
    assert "skipped" not in shown.stdout


def test_again(made, run):
    """What is there is used: no shard is written, and the report is made anew."""
    path, _, _ = made
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (path / "run.fs" / "shards").iterdir())
    shown = run("demo", "--out", path, "--quiet")
    assert shown.exit_code == 0, shown.stderr
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (path / "run.fs" / "shards").iterdir()) == before
