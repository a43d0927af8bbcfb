"""``fisherscope verify``: words or JSON on stdout, and an exit code that scripts can go by."""

import json

import pytest

from tests.store.forging import flip
from tests.store.store_cases import Run, header_of, small_layout


@pytest.fixture
def store(tmp_path):
    run = Run(header_of(small_layout()), n=4, batches=((3, 1), (0, 2)))
    run.write(tmp_path / "run.fs", durability="none")
    return tmp_path / "run.fs"


@pytest.mark.parametrize("options", [(), ("--quick",)])
def test_a_sound_store(run, store, options):
    """Exit code 0 and one line that says what was looked at."""
    result = run("verify", store, *options)
    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    assert "nothing is wrong" in line
    assert ("names and sizes" in line) == bool(options)
    assert result.stderr == ""


def test_a_damaged_store(run, store):
    """Exit code 1, and a line for each finding and note; --quick does not see into shards."""
    shard = next(path for path in sorted((store / "shards").iterdir()) if path.name.endswith("3.h5"))
    flip(shard, -1)
    (store / "shards" / ".tmp-r0000-000001").write_bytes(b"")
    result = run("verify", store)
    assert result.exit_code == 1
    first, *lines = result.stdout.splitlines()
    assert "1 finding " in first
    assert shard.name in lines[0]
    assert "note: 'shards/.tmp-r0000-000001'" in lines[1]
    assert run("verify", store, "--quick").exit_code == 0


def test_json(run, store):
    """The same for programs."""
    assert json.loads(run("verify", store, "--json").stdout)["ok"] is True
    shard = min((store / "shards").iterdir())
    flip(shard, -1)
    result = run("verify", store, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (found["ok"], found["quick"], len(found["findings"])) == (False, False, 1)
    (finding,) = found["findings"]
    assert finding["file"] == f"shards/{shard.name}"
    assert 0 <= finding["start"] < finding["stop"] <= shard.stat().st_size


def test_what_is_no_store(run, tmp_path):
    """One message, no traceback."""
    result = run("verify", tmp_path)
    assert result.exit_code == 1
    assert "is not a fisherscope store" in result.stderr
    assert "Traceback" not in result.stderr
