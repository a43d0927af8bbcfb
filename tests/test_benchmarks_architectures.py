"""The sweep over architectures tells what became of each model, whatever goes wrong with it."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fisherscope.errors import AdapterError
from fisherscope.layout import ModelLayout

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "architectures.py"
NO_HEADS = ModelLayout(model_type="mamba", parameters=(), attention=())


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("benchmarks_architectures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_three_verdicts(tmp_path):
    """A registered family and a detected one are confirmed in every layer; mamba has modules only."""
    out = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT), "--only", "llama,biogpt,mamba", "--json", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["totals"] == {"confirmed": 2, "module-level": 1}
    assert found["versions"].keys() == {"transformers", "torch", "fisherscope"}
    rows = {row["model_type"]: row for row in found["rows"]}
    for model_type, adapter in (("llama", "registered"), ("biogpt", "detected")):
        row = rows[model_type]
        assert (row["verdict"], row["adapter"]) == ("confirmed", adapter)
        assert row["confirmed"] == row["present"] == 4
    assert rows["mamba"]["present"] == 0
    assert "mamba" in rows["mamba"]["reason"]
    assert "3 model types: 2 confirmed, 1 module-level, 0 refused, 0 not instantiated" in run.stdout


@pytest.mark.parametrize(
    ("layout", "said", "error", "verdict", "reason"),
    [
        (NO_HEADS, ["no heads in layer 1"], None, "module-level", "no heads in layer 1"),
        (NO_HEADS, [], None, "module-level", "heads in 0 of 4 attention modules, and no warning says so"),
        (None, [], AdapterError("wrong at layer 1"), "refused", "wrong at layer 1"),
        (None, [], KeyError("rope"), "refused", "KeyError instead of an AdapterError"),
    ],
)
def test_verdicts_without_heads(script, layout, said, error, verdict, reason):
    """What was said or raised is the reason, and an exception of another kind is called by its name."""
    found, why = script.classify(layout, said, error, 4)
    assert found == verdict
    assert reason in why


def test_a_model_that_does_not_run_is_a_row(script):
    """An exception in a plain forward does not end the sweep."""
    task = script.Task("broken", "CAUSAL_LM", lambda config: {}, selection="llama gpt2")
    rows = list(script.sweep([task], []))
    assert [row.model_type for row in rows] == ["llama", "gpt2"]
    for row in rows:
        assert row.verdict == "not instantiated"
        assert "specify" in row.reason


def test_a_model_that_takes_too_long_is_a_row(script, monkeypatch):
    """A model that hangs, even inside a handler of exceptions, ends at the time limit."""
    monkeypatch.setattr(script, "SECONDS", 0.2)

    def hang(_config):
        try:
            time.sleep(20)
        except Exception:
            return {}

    (row,) = script.sweep([script.Task("slow", "CAUSAL_LM", hang, selection="llama")], [])
    assert row.verdict == "not instantiated"
    assert "took more than 0.2 s" in row.reason


def test_unknown_types_are_refused():
    """A type that transformers does not have is an error, not an empty table."""
    command = [sys.executable, str(SCRIPT), "--only", "lama"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "no such model type in transformers: lama" in run.stderr
