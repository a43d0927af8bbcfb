"""The benchmark of proofs runs in its smallest form, and finds clean batches clean."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "proofs.py"


@pytest.mark.slow
def test_smoke(tmp_path):
    """Cost as ratios, and clean batches of two families in both dtypes, none of them refused."""
    out = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT), "--smoke", "--json", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["variant"].split()[0] for row in rows if "variant" in row] == [
        'check="auto"',
        'check="every"',
    ]
    clean = [row for row in rows if "family" in row]
    assert len(clean) == 4
    assert all(row["batches"] == 2 and not row["refused"] for row in clean)
    assert all(0 < row["largest"] < 1 and row["seen"] > 0 for row in clean)
    assert "0 runs refused" in done.stdout
