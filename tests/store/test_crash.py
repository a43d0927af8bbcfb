"""Killed or failing at every system call, a run over two tasks loses nothing and can be finished."""

import contextlib
import errno
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from fisherscope.errors import StoreError, StoreFullError
from fisherscope.store import StoreWriter, open_store
from tests.store.contents import assert_finished, committed, everything_of
from tests.store.faults import Calls, FailingAt, in_a_fork, killed_at, was_killed
from tests.store.store_cases import assert_holds, names

ROOT = Path(__file__).resolve().parents[2]

SLOW = pytest.param("every", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
HOW = [pytest.param({}, id="at once"), pytest.param({"queue": 2}, id="in the background")]


@pytest.fixture(scope="module")
def whole(tasks, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole") / "run.fs"
    tasks.write(root)
    assert len(names(root / "shards")) >= 6
    return everything_of(open_store(root))


@pytest.fixture
def points(request, tasks, how, tmp_path):
    """At which calls to interfere: all of an undisturbed run, or every 61st with the ends."""
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch)
        tasks.write(tmp_path / "undisturbed.fs", **how)
    total = len(calls.names)
    assert total > 200
    return range(1, total + 1) if request.param == "every" else [*range(1, total, 61), total]


def check_and_finish(root, tasks, truth, whole):
    """What is committed is right, and the same run goes on to what an undisturbed one ends with."""
    committed(root, truth)
    tasks.write(root, durability="none")
    assert_finished(root, whole)


def error_of(call):
    """The error that a call raises on purpose or from the system, or None."""
    try:
        call()
    except (StoreError, OSError) as error:
        return error
    return None


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("points", ["some", SLOW], indirect=True)
def test_killed_at_every_system_call_a_run_can_be_finished(tasks, truth, whole, tmp_path, how, points):
    """SIGKILL at call k, with half of a write done."""
    killed = 0
    for k in points:
        root = tmp_path / f"{k}.fs"

        def run(k=k, root=root):
            with pytest.MonkeyPatch.context() as patch:
                Calls(patch, killed_at(k))
                tasks.write(root, **how)

        killed += was_killed(in_a_fork(run))
        check_and_finish(root, tasks, truth, whole)
    assert killed >= len(points) - 2  # how often threads meet at a call varies by a few


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("points", ["some", SLOW], indirect=True)
@pytest.mark.parametrize(
    ("number", "lasting"),
    [(errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EIO, False)],
    ids=["ENOSPC", "ENOSPC from then on", "EIO"],
)
def test_failing_at_every_system_call_a_run_can_be_finished(
    tasks, truth, whole, tmp_path, how, points, number, lasting
):
    """The error is raised as such, a full disk as StoreFullError; the next attempt completes."""
    full = 0
    for k in points:
        root = tmp_path / f"{k}.fs"
        fail = FailingAt(k, number, lasting=lasting)
        with pytest.MonkeyPatch.context() as patch:
            Calls(patch, fail)
            error = error_of(lambda root=root: tasks.write(root, **how))
        if number == errno.ENOSPC and fail.seen[:1] in (["posix_fallocate"], ["pwrite"]):
            assert isinstance(error, StoreFullError), k
            full += 1
        elif isinstance(error, OSError):
            assert error.errno == number
        check_and_finish(root, tasks, truth, whole)
    assert (full > 0) == (number == errno.ENOSPC)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("points", ["some", SLOW], indirect=True)
def test_after_a_failure_the_same_writer_goes_on_or_refuses(tasks, truth, whole, tmp_path, how, points):
    """A writer whose commit failed either still works, or says that the store must be opened again."""
    went_on = 0
    for k in points:
        root = tmp_path / f"{k}.fs"
        with pytest.MonkeyPatch.context() as patch:
            Calls(patch, FailingAt(k, errno.ENOSPC))
            writer = None
            with contextlib.suppress(StoreFullError, OSError):
                writer = StoreWriter.open(root, tasks.header, **how)
            if writer is not None:
                first = error_of(lambda writer=writer: tasks.finish(writer))
                again = error_of(lambda writer=writer: tasks.finish(writer))
                went_on += first is not None and again is None
                # a thread that seals stops at its first error, and every later call raises it
                assert again is None or again is first or "open it again" in str(again)
                with contextlib.suppress(OSError, StoreError):
                    writer.close()
        check_and_finish(root, tasks, truth, whole)
    if not how:
        assert went_on >= len(points) // 2


def test_the_next_segment_opens_while_a_thread_commits_the_last(tasks, tmp_path, whole):
    """A line that is half written by another thread is no commit that failed half-way."""
    writing, opened = threading.Event(), threading.Event()

    def hold(call):
        if threading.current_thread().name == "fisherscope-sealer" and call.name == "pwrite":
            writing.set()
            assert opened.wait(30)
        return call.go()

    run = tasks.runs[0]
    with pytest.MonkeyPatch.context() as patch:
        Calls(patch, hold)
        with StoreWriter.open(tmp_path / "run.fs", tasks.header, queue=2) as writer:
            writer.declare_task(run.task, run.keys)
            run.write_segment(writer, run.batches[0])
            assert writing.wait(30)
            with run.open_segment(writer, run.batches[1]) as segment:
                opened.set()
                run.put(segment, run.batches[1])
                segment.commit()
    tasks.write(tmp_path / "run.fs")
    assert_finished(tmp_path / "run.fs", whole)


def test_a_process_killed_in_a_segment_resumes_to_identical_content(small, root):
    """A real process, killed by a real signal between two pieces of a segment."""
    script = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from tests.store.store_cases import Run, header_of, small_layout
        from fisherscope.store import StoreWriter
        run = Run(header_of(small_layout()), n=4, batches=((3, 1), (0, 2)))
        writer = StoreWriter.open({str(root)!r}, run.header)
        writer.constants(run.constants())
        writer.declare_task(run.task, run.keys)
        run.write_segment(writer, [3, 1])
        segment = run.open_segment(writer, [0, 2])
        run.put(segment, [0])
        sys.stdout.write("half\\n")
        sys.stdout.flush()
        time.sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "half\n"
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert any(name.startswith(".tmp-") for name in names(root / "shards"))
    assert open_store(root).samples(small.task)["row"].tolist() == [1, 3]
    small.write(root)
    assert_holds(open_store(root), small)
    assert not any(name.startswith(".tmp-") for name in names(root / "shards"))
