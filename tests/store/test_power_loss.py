"""The power is cut after every operation: what was committed is there, and the run can be finished."""

import shutil
from random import Random

import pytest

from fisherscope.errors import StoreError
from fisherscope.store import open_store
from fisherscope.store.journal import decode_line
from tests.store.contents import Seen, assert_finished, committed, everything_of
from tests.store.disk_model import Disk, Recorder

SLOW = pytest.param(1, 4, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


def recorded(tasks, base, **options):
    """What a whole run does to the disk, and what each line of its journal commits."""
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch, base)
        tasks.write(base / "run.fs", **options)
    (start,) = (base / "run.fs" / "journal").iterdir()
    records = [decode_line(line).record for line in start.read_bytes().splitlines()]
    return recorder, records


def committed_by(records):
    """What is in a store whose journal holds these lines."""
    segments = [record for record in records if record["kind"] == "segment"]
    samples = {("sample", record["task"], row) for record in segments for row in record["rows"]}
    counts = {record["task"]: record["count"] for record in records if record["kind"] == "snapshot"}
    return Seen(frozenset(samples), counts)


def committed_after_each(recorder, records, *, durable):
    """Per operation what was committed then: the line is written and, if durable, synced."""
    written = certain = 0
    for operation in recorder.operations:
        if operation.node == recorder.journal:
            written += operation.data.count(b"\n")
            if operation.kind == "sync" or not durable:
                certain = written
        yield operation, committed_by(records[:certain])


def states(recorder, records, scratch, choices, *, durable, step):
    """Disks as they may be found after every ``step``-th operation, each with what must be there."""
    disk = Disk(recorder.directories)
    for number, (operation, must) in enumerate(committed_after_each(recorder, records, durable=durable)):
        disk.apply(operation)
        for choice in range(0 if number % step else choices):
            target = scratch / f"{number}-{choice}"
            disk.after_power_loss(Random(f"{number} {choice}"), target)
            yield target / "run.fs", must
            shutil.rmtree(target)


def check(root, must, tasks, truth, whole):
    """Nothing that was committed is lost or wrong, and the same run goes on to the same end."""
    assert committed(root, truth).holds(must), root
    tasks.write(root, durability="none")
    assert_finished(root, whole)


@pytest.mark.parametrize("how", [{}, {"queue": 2}], ids=["at once", "in the background"])
@pytest.mark.parametrize(("step", "choices"), [(13, 1), SLOW])
def test_what_was_committed_survives_the_loss_of_power(tasks, truth, tmp_path, how, step, choices):
    """durability="power": names and bytes that were not synced are lost, or torn, or there."""
    recorder, records = recorded(tasks, tmp_path, **how)
    whole = everything_of(open_store(tmp_path / "run.fs"))
    tried = 0
    for root, must in states(recorder, records, tmp_path, choices, durable=True, step=step):
        check(root, must, tasks, truth, whole)
        tried += bool(must.samples)
    assert tried > 10


def test_without_syncs_the_same_replay_finds_losses(tasks, truth, tmp_path):
    """durability="none" does not hold what "power" does: the replay can tell the two apart."""
    recorder, records = recorded(tasks, tmp_path, durability="none")
    whole = everything_of(open_store(tmp_path / "run.fs"))
    lost = 0
    for root, must in states(recorder, records, tmp_path, 1, durable=False, step=7):
        try:
            check(root, must, tasks, truth, whole)
        except (AssertionError, StoreError):
            lost += 1
    assert lost > 5
