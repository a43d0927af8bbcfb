"""Killed or failing at every system call, a store loses nothing that was committed and can be finished."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from fisherscope.errors import StoreError, StoreFullError
from fisherscope.store import StoreWriter, open_store
from tests.store.store_cases import assert_holds, names

CALLS = ("open", "mkdir", "posix_fallocate", "pwrite", "fsync", "rename", "unlink", "ftruncate", "preadv")
ROOT = Path(__file__).resolve().parents[2]


SLOW = pytest.param("every", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


class Nth:
    """Stand-ins for the system calls of ``os`` which do something at the k-th call from now on."""

    def __init__(self, patch, k, action):
        self.names = []
        for name in CALLS:
            patch.setattr(os, name, self._wrapped(name, getattr(os, name), k, action))

    def _wrapped(self, name, real, k, action):
        def call(*args, **options):
            self.names.append(name)
            if len(self.names) == k:
                action(real, *args, **options)
            return real(*args, **options)

        return call


@pytest.fixture
def points(request, small, tmp_path):
    """At which calls to interfere: all of an undisturbed run, or some where the kind of call changes."""
    small.write(tmp_path / "first.fs")  # what is loaded when first used makes calls of its own
    with pytest.MonkeyPatch.context() as patch:
        counter = Nth(patch, 0, None)
        small.write(tmp_path / "undisturbed.fs")
    assert len(counter.names) > 100
    everywhere = range(1, len(counter.names) + 1)
    if request.param == "every":
        return everywhere
    middle = range(len(counter.names) // 3, 2 * len(counter.names) // 3)  # one segment and one snapshot
    return [k for k in middle if counter.names[k - 1] != counter.names[k - 2]][::2]


def _kill(real, *args, **options):
    if real.__name__ == "pwrite":  # torn: half of the bytes arrive
        real(args[0], memoryview(args[1])[: max(1, len(args[1]) // 2)], args[2])
    os.kill(os.getpid(), signal.SIGKILL)


def _check_what_is_committed(root, run):
    """Whatever a reader sees now is right: a prefix of the commits, value for value."""
    if not (root / "store.json").exists():
        return
    store = open_store(root)
    for task in store.tasks:
        frame = store.samples(task)
        assert frame["loss"].tolist() == [run.loss[row] for row in frame["row"]]
        for name, expected in run.gradients.items():
            assert store.gradients(task, name).equal(expected[frame["row"].tolist()].bfloat16().float())


def _error_of(call):
    """The error that a call raises on purpose or from the system, or None."""
    try:
        call()
    except (StoreError, OSError) as error:
        return error
    return None


@pytest.mark.parametrize("points", ["some", SLOW], indirect=True)
def test_killed_at_every_system_call_a_run_can_be_finished(small, tmp_path, points):
    """SIGKILL at call k, with half of a write done: what was committed reads back, and can be completed."""
    for k in points:
        root = tmp_path / f"{k}.fs"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the child runs no other thread's code
            child = os.fork()
        if not child:
            try:
                with pytest.MonkeyPatch.context() as patch:
                    Nth(patch, k, _kill)
                    small.write(root)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), k
        assert os.WTERMSIG(status) == signal.SIGKILL
        _check_what_is_committed(root, small)
        if root.is_dir():
            small.write(root, durability="none")
            assert_holds(open_store(root), small)
            assert not [name for name in names(root / "shards") if name.startswith(".tmp-")]


@pytest.mark.parametrize("points", ["some", SLOW], indirect=True)
@pytest.mark.parametrize("number", [28, 5], ids=["ENOSPC", "EIO"])
def test_failing_at_every_system_call_a_run_can_be_finished(small, tmp_path, points, number):
    """An error at call k is raised as such, a full disk as StoreFullError, and the next attempt completes."""
    full = 0
    for k in points:
        root = tmp_path / f"{k}.fs"
        seen = []

        def fail(real, *args, seen=seen, **options):
            seen.append(real.__name__)
            raise OSError(number, os.strerror(number))

        with pytest.MonkeyPatch.context() as patch:
            Nth(patch, k, fail)
            error = _error_of(lambda root=root: small.write(root))
        assert len(seen) == 1
        if number == 28 and seen[0] in {"posix_fallocate", "pwrite"}:
            assert isinstance(error, StoreFullError)
            full += 1
        elif error is not None and not isinstance(error, StoreFullError):
            assert error.errno == number
        _check_what_is_committed(root, small)
        small.write(root, durability="none")
        assert_holds(open_store(root), small)
        assert not [name for name in names(root / "shards") if name.startswith(".tmp-")]
    assert (full > 0) == (number == 28)


@pytest.mark.parametrize("points", ["some", SLOW], indirect=True)
def test_failing_at_every_system_call_the_same_writer_goes_on_or_refuses(small, tmp_path, points):
    """After a failed commit a writer either still works, or says that the store must be opened again."""
    went_on = 0
    for k in points:
        root = tmp_path / f"{k}.fs"

        def fail(real, *args, **options):
            raise OSError(28, os.strerror(28))

        with pytest.MonkeyPatch.context() as patch:
            Nth(patch, k, fail)
            writer = None
            with contextlib.suppress(StoreFullError, OSError):
                writer = StoreWriter.open(root, small.header)
            if writer is not None:
                error = _error_of(lambda writer=writer: small.finish(writer))
                again = _error_of(lambda writer=writer: small.finish(writer))
                went_on += error is not None and again is None
                assert again is None or "open it again" in str(again)
                with contextlib.suppress(OSError):
                    writer.close()
        small.write(root, durability="none")
        assert_holds(open_store(root), small)
    assert went_on >= len(points) // 2


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
