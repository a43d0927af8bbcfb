"""A disk that is full, for real: an error that says how much is missing, and nothing committed is lost."""

import os
import re
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fisherscope as fs
from fisherscope.store import verify

TREE = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
NAMES_BYTES = re.compile(r"\d+ bytes .* needed, \d+ bytes .* free")


def collect(arguments, **options):
    """``fisherscope collect`` in a process of its own, ended: its exit is looked at, too."""
    return subprocess.run(
        [sys.executable, "-m", "fisherscope", "collect", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        timeout=120,
        **options,
    )


@pytest.fixture
def command(model_dir, tasks):
    return ["--model", model_dir, *tasks, "--batch-size", 2, "--quiet", "--durability", "process"]


def shard_sizes(path):
    """Bytes of the shards that hold samples, and of the snapshots."""
    store = fs.open_store(path)
    segments = [
        s.shard.nbytes for ledger in store.ledgers for t in ledger.segments.values() for s in t.values()
    ]
    snapshots = [s.shard.nbytes for ledger in store.ledgers for s in ledger.snapshots.values()]
    return segments, snapshots


def assert_same_samples(one, other):
    """The committed samples of the first store are those of the second."""
    for task in one.tasks:
        rows = one.samples(task)["row"].tolist()
        if not rows:
            continue
        assert one.samples(task).equals(other.samples(task).iloc[rows].reset_index(drop=True))
        for name in one.gradient_parameters:
            assert one.gradients(task, name).equal(other.gradients(task, name, rows))


def test_a_limit_of_file_sizes_is_a_full_disk(command, run, tmp_path):
    """RLIMIT_FSIZE below the larger kind of shard: exit code 1, no crash at exit, and it completes later."""
    whole, path = tmp_path / "whole.fs", tmp_path / "run.fs"
    assert run("collect", *command, "--out", whole).exit_code == 0
    segments, snapshots = shard_sizes(whole)
    assert max(segments) != max(snapshots)
    limit = max(*segments, *snapshots) - 1

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    ended = collect([*command, "--out", path], preexec_fn=limited)
    assert ended.returncode == 1, ended.stderr
    assert NAMES_BYTES.search(ended.stderr)
    assert "Traceback" not in ended.stderr
    assert verify(path).ok
    assert_same_samples(fs.open_store(path), fs.open_store(whole))
    assert run("collect", *command, "--out", path).exit_code == 0
    store = fs.open_store(path)
    assert all(store.is_complete(task) for task in store.tasks)
    assert_same_samples(fs.open_store(whole), store)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of so many bytes, which is gone afterwards; skips where that is not allowed."""
    mounted = []

    def mount(nbytes):
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(path)]
        if (
            shutil.which("mount") is None
            or subprocess.run(command, capture_output=True, check=False).returncode
        ):
            pytest.skip("a file system can be mounted by root only")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        # lazily: readers may still hold maps of its files
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path, free):
    """Take all space of a disk but ``free`` bytes."""
    status = os.statvfs(path)
    size = status.f_bavail * status.f_frsize - free
    with (path / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(command, run, small_disk):
    """The estimate is larger than what is free: both are named, and the exit code is 1."""
    disk = small_disk(64 << 20)
    fill(disk, 64 << 10)
    ended = collect([*command, "--out", disk / "run.fs"])
    assert ended.returncode == 1, ended.stderr
    assert re.search(r"would take [0-9,]+ bytes more and [0-9,]+ are free", ended.stderr), ended.stderr
    assert "Traceback" not in ended.stderr
    (disk / "filler").unlink()
    assert run("collect", *command, "--out", disk / "run.fs").exit_code == 0
    assert verify(disk / "run.fs").ok


CHILD = """
import sys
sys.path.insert(0, {tree!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from fisherscope.instrument.collection import Collection
from tests.cli.test_full_disk import fill
from tests.store.collected import collect, wrapped
run_batch, seen = Collection.run_batch, []
def filling(self, *args):
    seen.append(1)
    if len(seen) == 3:
        self.writer.flush()
        fill(Path({disk!r}), 16 << 10)
    return run_batch(self, *args)
Collection.run_batch = filling
collect(wrapped(), {root!r})
"""


def test_a_disk_that_fills_up_during_a_run_ends_it_and_loses_nothing(small_disk, tmp_path):
    """ENOSPC from a real file system: StoreFullError, a clean exit, samples read, and the run completes."""
    from tests.store.collected import collect as collected
    from tests.store.collected import wrapped

    disk = small_disk(64 << 20)
    script = textwrap.dedent(CHILD).format(tree=str(TREE), disk=str(disk), root=str(disk / "run.fs"))
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert ended.returncode == 1, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert "StoreFullError" in last
    assert NAMES_BYTES.search(last)
    assert verify(disk / "run.fs").ok
    scope = wrapped()
    whole = collected(scope, tmp_path / "whole.fs", durability="none")
    before = fs.open_store(disk / "run.fs")
    assert sum(before.committed(task) for task in before.tasks) >= 2
    assert_same_samples(before, whole)
    (disk / "filler").unlink()
    assert_same_samples(whole, collected(scope, disk / "run.fs", durability="none"))
