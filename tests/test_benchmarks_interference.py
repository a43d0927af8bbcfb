"""The benchmark of interference runs in its smallest form, and compares what it says it compares."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "interference.py"


@pytest.mark.slow
def test_every_part_is_measured(tmp_path):
    """Ratios are positive numbers; those that have a bar are held against it."""
    out = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT), "--smoke", "--repeats", "1", "--json", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    bars = {
        "times the loop": "at least 30",
        "share of the rate": "at least 0.5",
        "share of the budget": "at most 1",
    }
    for part, bar in bars.items():
        held = [row for row in rows if part in row["setting"] and row["bar"]]
        assert held, part
        assert {row["bar"] for row in held} == {bar}
    for row in rows:
        assert math.isfinite(row["ratio"])
        assert row["ratio"] > 0
        assert row["variant"] in done.stdout
