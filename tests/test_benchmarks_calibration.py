"""The calibration benchmark runs, and its generators are what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import null_models

    yield null_models
    sys.modules.pop("null_models", None)


def test_tables_and_json(tmp_path):
    """Every null has a row with its seeds; numbers that were printed stand in the JSON."""
    out = tmp_path / "results.json"
    command = [sys.executable, str(BENCHMARKS / "calibration.py"), "--seeds", "2", "--only", "null"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--json", str(out)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    names = [row["setting"] for row in rows]
    assert names == ["S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "heavy", "realistic", "rare"]
    for row in rows:
        assert row["seeds"] == 2
        assert f"| {row['setting']} | 2 | {row['numbers']['T1']['mean']:.3f} (" in done.stdout
        assert 0 <= row["numbers"]["T1"]["mean"] <= 1
    # the test that takes directions for random calls something in every run of a correlated null
    assert rows[2]["numbers"]["naive z"]["mean"] == 1


def test_generators_are_null_and_plants_are_where_they_should_be(models):
    """Shapes, no sample in two planted pairs, cosines as stated, nothing else moved."""
    for name, model in models.MODELS.items():
        first, second = model(np.random.default_rng(0), 50)
        assert first.shape == second.shape == (50, models.D), name
        assert np.isfinite(first).all(), name
    first, second = models.s2(np.random.default_rng(0), 100)
    u, v = models.natural(first, second)
    np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1)
    assert abs((u @ v.T).mean()) < 0.01
    for kind, count in (("pairs", 30), ("cluster", 64)):
        a, b, truth = models.plant(np.random.default_rng(1), first, second, kind, 1.0)
        assert truth.sum() == count
        assert kind == "cluster" or (truth.sum(0).max(), truth.sum(1).max()) == (1, 1)
        np.testing.assert_array_equal(a[~truth.any(1)], first[~truth.any(1)])
        np.testing.assert_array_equal(b[~truth.any(0)], second[~truth.any(0)])
        u, v = models.natural(a, b)
        assert abs((u @ v.T)[truth].mean() + 0.5) < 0.06
