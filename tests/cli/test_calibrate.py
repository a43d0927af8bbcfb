"""``fisherscope calibrate``: a table, words, JSON, and an exit code that scripts can go by."""

import json
import re

import numpy as np
import pytest

from tests.analyses.synthetic import make_layout, make_task, write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    layout = make_layout()
    tasks = {name: make_task(layout, name, 16, seed) for seed, name in enumerate(("math", "code"))}
    return write_store(tmp_path_factory.mktemp("calibrate") / "run.fs", layout, tasks).store.path


def test_a_calibrated_store(run, store):
    """Exit code 0; both tasks and all tests, in a table and in words; notes go to stderr."""
    result = run("calibrate", store, "--splits", 10)
    assert result.exit_code == 0
    for task in ("math", "code"):
        assert f"{task}, pairs: something was called in 0 of 10 splits (8 samples a side)" in result.stdout
        assert re.search(rf"^calibrate {task}: \d+\.\d s$", result.stderr, re.MULTILINE)
    assert run("calibrate", store, "--splits", 10, "--quiet").stderr == ""


def test_json(run, store):
    """The same for programs: strict JSON alone on stdout."""
    result = run("calibrate", store, "--splits", 3, "--json")
    found = json.loads(result.stdout)
    table = found["tables"]["calibrate"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    assert [(row["task"], row["test"]) for row in rows] == [
        (task, test) for task in ("math", "code") for test in ("pairs", "heads", "blocks")
    ]
    assert [row["splits"] for row in rows] == [3, 2, 3] * 2


def test_a_test_that_calls_too_much(run, store, monkeypatch):
    """Exit code 1, and what it means."""
    from fisherscope.analyses.conflict import calibration

    monkeypatch.setattr(calibration, "pair_test", lambda cross, a, b: np.full(cross.shape, 1e-9))
    result = run("calibrate", store, "--splits", 10, "-q")
    assert result.exit_code == 1
    assert "10 of 10 splits" in result.stdout
    assert "cannot be trusted here" in result.stdout


def test_options_from_a_file(run, store, tmp_path):
    """The same file that analyze takes; wrong ones and wrong tasks are wrong usage."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"tasks": ["code"], "conflict": {"metric": "euclidean"}}))
    result = run("calibrate", store, "--splits", 2, "--config", config)
    assert result.exit_code == 0
    assert "math" not in result.stdout
    config.write_text(json.dumps({"tasks": ["nonsense"]}))
    result = run("calibrate", store, "--config", config)
    assert result.exit_code == 2
    assert "no task 'nonsense'" in result.stderr
    assert run("calibrate", store, "--splits", 0).exit_code == 2


def test_what_is_no_store(run, tmp_path):
    """One message, exit code 1."""
    result = run("calibrate", tmp_path)
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
