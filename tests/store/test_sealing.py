"""Sealing in the background: the queue is bounded, errors come out, and what was handed over is committed."""

import threading

import pytest

from fisherscope.errors import StoreFullError
from fisherscope.store import StoreWriter, disk, open_store
from fisherscope.store.progressions import pack, size, unpack
from fisherscope.store.sealing import Sealer
from tests.store.store_cases import Run, assert_holds, header_of, names, small_layout


def test_jobs_run_in_order_behind_a_bounded_queue():
    """While one job is held up, as many wait as the queue holds; the next submit blocks until then."""
    sealer, gate, done = Sealer(2), threading.Event(), []
    sealer.submit(lambda: gate.wait() and done.append(0), done.clear)
    submitted = []

    def many():
        for k in range(1, 5):
            sealer.submit(lambda k=k: done.append(k), done.clear)
            submitted.append(k)

    thread = threading.Thread(target=many)
    thread.start()
    while len(submitted) < 2:
        pass
    thread.join(0.1)
    assert thread.is_alive()
    assert submitted == [1, 2]
    gate.set()
    thread.join()
    sealer.wait()
    assert done == [0, 1, 2, 3, 4]
    sealer.close()


def test_after_a_failure_nothing_more_is_done():
    """Jobs behind a failed one are given up, and every later call raises what it raised."""
    sealer, gate, done, given_up = Sealer(3), threading.Event(), [], []

    def fail():
        gate.wait()
        raise OSError(5, "no medium")

    sealer.submit(fail, lambda: given_up.append("first"))
    sealer.submit(lambda: done.append(1), lambda: given_up.append("second"))
    gate.set()
    with pytest.raises(OSError, match="no medium"):
        sealer.wait()
    with pytest.raises(OSError, match="no medium"):
        sealer.submit(lambda: done.append(2), lambda: given_up.append("third"))
    with pytest.raises(OSError, match="no medium"):
        sealer.close()
    assert (done, given_up) == ([], ["second", "third"])


@pytest.fixture
def run():
    """Six segments of one sample."""
    return Run(header_of(small_layout()), n=6, batches=tuple((row,) for row in range(6)))


def test_a_run_in_the_background_is_the_same_store(run, tmp_path):
    """Byte for byte, journal included."""
    run.write(tmp_path / "one.fs")
    run.write(tmp_path / "two.fs", queue=2)
    for path in (tmp_path / "one.fs").rglob("*"):
        other = tmp_path / "two.fs" / path.relative_to(tmp_path / "one.fs")
        assert other.exists()
        assert path.is_dir() or path.read_bytes() == other.read_bytes()


def test_closing_commits_what_was_handed_over(run, root):
    """Segments that wait when the writer is closed are committed, and their rows are taken before that."""
    with StoreWriter.open(root, run.header, queue=4) as writer:
        writer.declare_task(run.task, run.keys)
        for rows in run.batches[:4]:
            run.write_segment(writer, rows)
        with pytest.raises(ValueError, match="committed already"):
            run.open_segment(writer, [3])
        assert writer.committed_rows(run.task) == {0, 1, 2, 3}
        run.write_segment(writer, [4])
    assert open_store(root).committed(run.task) == 5


def test_a_full_disk_in_the_background_comes_out_at_the_next_call(run, root, monkeypatch):
    """The error is that of the commit; nothing behind it is committed, and a resumed run completes."""
    real, calls = disk.rename, []

    def full(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(source, target)

    with pytest.raises(OSError, match="No space left") as caught:  # noqa: SIM117, PT012
        with StoreWriter.open(root, run.header, queue=2) as writer:
            writer.declare_task(run.task, run.keys)
            monkeypatch.setattr(disk, "rename", full)
            for rows in run.batches:
                run.write_segment(writer, rows)
            writer.flush()
    assert not isinstance(caught.value, StoreFullError)
    monkeypatch.undo()
    assert open_store(root).samples(run.task)["row"].tolist() == [0, 1]
    run.write(root)
    assert_holds(open_store(root), run)
    assert not [name for name in names(root / "shards") if name.startswith(".tmp-")]


@pytest.mark.parametrize(
    ("numbers", "packed"),
    [
        ([], ()),
        ([5], ((5, 1, 1),)),
        (range(1000), ((0, 1000, 1),)),
        (range(3, 4000, 4), ((3, 1000, 4),)),
        ([0, 1, 2, 7, 9, 11, 13, 20], ((0, 3, 1), (7, 4, 2), (20, 1, 1))),
        ([0, 5, 6, 7], ((0, 1, 1), (5, 3, 1))),
        ([9, 3], ((3, 2, 6),)),
    ],
)
def test_sets_of_batches_are_few_progressions(numbers, packed):
    """What a rank has done takes a few numbers, and comes back."""
    assert pack(numbers) == packed
    assert unpack(packed).tolist() == sorted(numbers)
    assert size(packed) == len(numbers)
