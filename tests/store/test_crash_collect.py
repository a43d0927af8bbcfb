"""A real collection, killed or failing at its system calls, ends with the store of an undisturbed one."""

import contextlib
import errno
import shutil

import pytest

from fisherscope.errors import StoreError, StoreFullError
from fisherscope.store import finalize, open_store, verify
from tests.store.collected import collect, wrapped
from tests.store.contents import (
    assert_finished,
    everything_of,
    samples_of,
)
from tests.store.faults import Calls, FailingAt, in_a_fork, killed_at, was_killed

SLOW = pytest.param("every", marks=[pytest.mark.slow, pytest.mark.timeout(3600)])


@pytest.fixture(scope="module")
def scope():
    return wrapped()


@pytest.fixture(scope="module")
def undisturbed(scope, tmp_path_factory):
    """The store of a collection that nothing disturbs, and the number of its system calls."""
    root = tmp_path_factory.mktemp("whole") / "run.fs"
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch)
        store = collect(scope, root)
    assert sum(1 for ledger in store.ledgers for _ in ledger.shards()) >= 6
    return everything_of(store), len(calls.names)


@pytest.fixture
def points(request, undisturbed):
    _, total = undisturbed
    return range(1, total + 1) if request.param == "every" else range(total // 9, total, total // 4)


def check_and_finish(scope, root, whole):
    """Every committed sample is right, and the same call completes the store, to the bit."""
    if (root / "store.json").exists():
        samples = samples_of(open_store(root))
        assert samples.items() <= whole.items()
    collect(scope, root, durability="none")
    assert_finished(root, whole)


@pytest.mark.parametrize("points", ["some", SLOW], indirect=True)
def test_a_collection_killed_at_any_call_resumes_to_identical_content(scope, undisturbed, tmp_path, points):
    """SIGKILL of a forked child in the midst of scope.collect()."""
    whole, _ = undisturbed
    killed = 0
    for k in points:
        root = tmp_path / f"{k}.fs"

        def run(k=k, root=root):
            with pytest.MonkeyPatch.context() as patch:
                Calls(patch, killed_at(k))
                collect(scope, root)

        killed += was_killed(in_a_fork(run))
        check_and_finish(scope, root, whole)
    assert killed >= len(points) - 3  # how often threads meet at a call varies by a few


@pytest.mark.parametrize("points", ["some", SLOW], indirect=True)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_collection_that_fails_at_any_call_resumes_to_identical_content(
    scope, undisturbed, tmp_path, points, number
):
    """The disk fills or fails, for the thread that seals as well: an error, and the next call completes."""
    whole, _ = undisturbed
    for k in points:
        root = tmp_path / f"{k}.fs"
        fail = FailingAt(k, number)
        with pytest.MonkeyPatch.context() as patch:
            Calls(patch, fail)
            try:
                collect(scope, root)
            except (StoreError, OSError) as error:
                full = isinstance(error, StoreFullError)
                assert full or getattr(error, "errno", number) == number  # noqa: PT017
            else:
                assert fail.seen in ([], ["unlink"], ["fsync"])
        check_and_finish(scope, root, whole)


@pytest.mark.parametrize("step", [71, pytest.param(1, marks=SLOW.marks)])
@pytest.mark.parametrize("how", ["SIGKILL", "ENOSPC"])
def test_finalize_loses_nothing_wherever_it_stops(scope, undisturbed, tmp_path, how, step):
    """Shards are merged before the ones that they replace go; stopped in between, all is there once."""
    whole, _ = undisturbed
    collect(scope, tmp_path / "collected.fs", durability="none")
    shutil.copytree(tmp_path / "collected.fs", tmp_path / "merged.fs")
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch)
        done = finalize(tmp_path / "merged.fs")
    assert done.shards[1] < done.shards[0]
    assert_finished(tmp_path / "merged.fs", whole)
    for k in range(1, len(calls.names) + 1, step):
        root = tmp_path / f"{k}.fs"
        shutil.copytree(tmp_path / "collected.fs", root)

        def run(k=k, root=root):
            with pytest.MonkeyPatch.context() as patch:
                Calls(patch, killed_at(k) if how == "SIGKILL" else FailingAt(k, errno.ENOSPC))
                finalize(root)

        if how == "SIGKILL":
            was_killed(in_a_fork(run))
        else:
            with contextlib.suppress(StoreError, OSError):
                run()
        assert everything_of(open_store(root)) == whole
        verified = verify(root)
        assert verified.ok, verified.summary()
        finalize(root)
        assert_finished(root, whole)
        shutil.rmtree(root)
