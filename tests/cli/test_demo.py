"""``fisherscope demo``: from nothing to a report."""

import json
import os
import resource
import subprocess
import sys

import pandas as pd
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
    """Most of the ten surest pairs of contradicting tasks are planted, and most planted ones are found."""
    path, _, _ = made
    table = pd.read_csv(path / "report" / "tables" / "conflict.csv")
    table = table[(table["task_a"] == "math") & (table["task_b"] == "math_flipped")].sort_values("p")
    planted = set(planted_pairs())
    first = list(zip(table["sample_a"], table["sample_b"], strict=True))[:10]
    assert len(set(first) & planted) >= 8
    found = table[table["found"]]
    assert len(set(zip(found["sample_a"], found["sample_b"], strict=True)) & planted) >= 0.5 * len(planted)
    verdicts = pd.read_csv(path / "report" / "tables" / "conflict_verdicts.csv")
    assert verdicts.set_index(["task_a", "task_b"])["pairs"]["math", "code"] == 0


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


@pytest.mark.slow
def test_again(made, run):
    """What is there is used: no shard is written, and the report is made anew."""
    path, _, _ = made
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (path / "run.fs" / "shards").iterdir())
    shown = run("demo", "--out", path, "--quiet")
    assert shown.exit_code == 0, shown.stderr
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (path / "run.fs" / "shards").iterdir()) == before
