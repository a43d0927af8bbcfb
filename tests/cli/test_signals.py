"""A collection that is interrupted seals what is done, says how to resume, and resumes to the same store."""

import os
import shlex
import signal
import subprocess
import sys
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


# as in a terminal: whoever runs the tests in the background may have them ignore Ctrl-C
READY = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "import fisherscope.__main__ as m; print('ready', flush=True); m.main()"
)


@pytest.mark.parametrize(
    ("arguments", "delay", "number"),
    [
        (("analyze",), 0.002, signal.SIGINT),
        (("analyze",), 0.1, signal.SIGTERM),
        (("analyze",), 2.0, signal.SIGINT),
        (("calibrate", "--splits", "100000"), 0.002, signal.SIGTERM),
        (("calibrate", "--splits", "100000"), 3.0, signal.SIGINT),
        (("finalize",), 0.002, signal.SIGINT),
        (("verify",), 0.1, signal.SIGINT),
    ],
)
def test_every_command_answers_a_signal_at_any_time(uninterrupted, tmp_path, arguments, delay, number):
    """A message and 128 + signal, while libraries are imported as well as in the middle of the work."""
    name, *options = arguments
    out = ["--out", str(tmp_path / "report")] if name == "analyze" else []
    process = subprocess.Popen(
        [sys.executable, "-c", READY, name, str(uninterrupted.path), *options, *out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(delay)
    was_at_work = process.poll() is None  # a quick machine may be done before
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert was_at_work or delay > 0.5
    if was_at_work:
        assert process.returncode == 128 + number, stderr
        assert "Traceback" not in stderr
        assert f"{signal.Signals(number).name} stopped the command at once" in stderr
    assert fs.open_store(uninterrupted.path).is_complete("math")
