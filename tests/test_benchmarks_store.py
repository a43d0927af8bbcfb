"""The benchmark of the store runs in its smallest form, and compares what it says it compares."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "store.py"


@pytest.mark.slow
def test_every_part_is_measured_against_its_bar(tmp_path):
    """Ratios are positive numbers, each with the bar that it is held against."""
    out = tmp_path / "results.json"
    options = ["--smoke", "--repeats", "1", "--disk", tmp_path, "--tmpfs", tmp_path, "--json", out]
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    for part in ("sealing", "one head", "collecting", "opening"):
        assert [row for row in rows if row["setting"].startswith(part)], part
    for row in rows:
        assert math.isfinite(row["ratio"])
        assert row["ratio"] > 0
        assert row["bar"] in {"at least 0.8", "at most 1.2", "at most 1.3", "at most 1"}
        assert row["variant"] in done.stdout
    assert list(tmp_path.iterdir()) == [out]
