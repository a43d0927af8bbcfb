"""One store, killed thirty times at random: every sample is there once and bit for bit."""

import random
from pathlib import Path

import pytest

from fisherscope.store import open_store
from tests.store.contents import Seen, TwoTasks, committed, everything_of
from tests.store.faults import Calls, in_a_fork, killed_at, was_killed
from tests.store.store_cases import Run

ROOT = Path(__file__).resolve().parents[2]
KILLS = 30
BATCHES = 60


class Long(TwoTasks):
    """Many commits, so that there is something left to do after every kill."""

    def __init__(self):
        super().__init__()
        self.runs = [
            Run(self.header, n=BATCHES, task=task, seed=seed, batches=tuple((r,) for r in order(seed)))
            for seed, task in enumerate(("math", "code"))
        ]


def order(seed):
    return random.Random(seed).sample(range(BATCHES), BATCHES)


@pytest.fixture(scope="module")
def tasks():
    return Long()


@pytest.mark.parametrize("how", [{}, {"queue": 2}], ids=["at once", "in the background"])
def test_thirty_kills_at_random_calls_lose_and_repeat_nothing(tasks, truth, tmp_path, how):
    """Each run goes on from the last; what a reader saw once it sees after every later kill."""
    root, rng = tmp_path / "run.fs", random.Random(0)
    seen, kills = Seen(), 0
    while kills < KILLS:
        k = rng.randrange(5, 120)

        def run(k=k):
            with pytest.MonkeyPatch.context() as patch:
                Calls(patch, killed_at(k))
                tasks.write(root, **how)

        if not was_killed(in_a_fork(run)):
            break
        kills += 1
        now = committed(root, truth)
        assert now.holds(seen)
        seen = now
    assert kills == KILLS, "the run was over before it was killed often enough"
    tasks.write(root, **how)
    assert_each_once(root, tasks, truth)


def assert_each_once(root, tasks, truth):
    """All samples, none twice, and the aggregates of an undisturbed run."""
    store = open_store(root)
    for name, value in everything_of(store).items():
        assert truth[name] == value, name
    for run in tasks.runs:
        assert store.is_complete(run.task)
        rows = [row for segment in store.task_index(run.task).segments for row in segment.rows]
        assert sorted(rows) == list(range(run.n))
