"""A collection that is interrupted seals what is done, says how to resume, and resumes to the same store."""

import shlex
import signal
import time

import numpy as np
import pytest

import fisherscope as fs

ROWS = 96  # of a batch each: some seconds


def wait_for(path, process, seconds=60):
    """Waits until the constants are committed and a segment is being filled."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if list(path.glob("shards/*.h5")) and list(path.glob("shards/.tmp-*")):
            return
        time.sleep(0.02)
    raise AssertionError(f"nothing was written: {process.communicate()}")


@pytest.fixture(scope="module")
def task(tmp_path_factory, write_task):
    """Samples for a while, in a file whose name needs quotes in a shell."""
    rows = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}\n"} for i in range(ROWS)]
    return write_task(tmp_path_factory.mktemp("task") / "a task.jsonl", rows)


@pytest.fixture(scope="module")
def command(model_dir, task):
    """The arguments of a run that has much to seal."""
    return [
        "collect",
        "--model",
        model_dir,
        "--task",
        f"math={task}",
        "--batch-size",
        1,
        "--durability",
        "none",
    ]


@pytest.fixture(scope="module")
def uninterrupted(command, run, tmp_path_factory):
    """The store of a run that nobody stopped."""
    path = tmp_path_factory.mktemp("whole") / "run.fs"
    ended = run(*command, "--out", path, "--quiet")
    assert ended.exit_code == 0, ended.stderr
    assert ended.stderr == ""
    return fs.open_store(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_and_resume(command, uninterrupted, tmp_path, start, run, number):
    """128 + signal; the command in the message is the one that finishes the store."""
    path = tmp_path / "run.fs"
    process = start(*command, "--out", path)
    wait_for(path, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert "Traceback" not in stderr
    assert not fs.open_store(path).is_complete("math")

    resume = shlex.split(stderr.partition("resumes: ")[2])
    assert resume[:4] == ["python", "-m", "fisherscope", "collect"]
    resumed = run(*resume[3:])
    assert resumed.exit_code == 0, resumed.stderr
    assert str(ROWS) in resumed.stdout

    store = fs.open_store(path)
    assert store.is_complete("math")
    assert store.samples("math").equals(uninterrupted.samples("math"))
    assert store.groups("math").equals(uninterrupted.groups("math"))
    for name in store.gradient_parameters:
        for values in ("fisher", "mean", "gradients"):
            ours, theirs = getattr(store, values)("math", name), getattr(uninterrupted, values)("math", name)
            assert np.array_equal(ours.numpy(), theirs.numpy())
