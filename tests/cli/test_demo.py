"""``fisherscope demo``: from nothing to a report."""

import json
import time

import pytest

import fisherscope as fs
from fisherscope.demo import task_files


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The directory that the demo wrote, what it printed, and how many seconds it took."""
    from typer.testing import CliRunner

    from fisherscope.cli import app

    path = tmp_path_factory.mktemp("demo") / "out"
    begun = time.monotonic()
    shown = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["demo", "--out", str(path)])
    assert shown.exit_code == 0, shown.output
    return path, shown, time.monotonic() - begun


def test_report_is_the_last_line(made):
    """The page to open, so that it is not searched for."""
    path, shown, _ = made
    assert shown.stdout.splitlines()[-1] == str(path / "report" / "report.html")
    page = (path / "report" / "report.html").read_text(encoding="utf-8")
    assert len(page) < 10_000_000
    assert "math_flipped" in page


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
