"""One store, killed many times at random: every sample is there once and bit for bit."""

import random
from pathlib import Path

import pytest

from fisherscope.store import open_store
from tests.store.contents import Seen, TwoTasks, committed, everything_of
from tests.store.faults import Calls, in_a_fork, killed_at, was_killed
from tests.store.store_cases import Run

ROOT = Path(__file__).resolve().parents[2]
OFTEN = pytest.param((30, 60), marks=pytest.mark.slow, id="thirty times")


class Long(TwoTasks):
    """Many commits, so that there is something left to do after every kill."""

    def __init__(self, batches):
        super().__init__()
        self.runs = [
            Run(
                self.header,
                n=batches,
                task=task,
                seed=seed,
                batches=tuple((r,) for r in order(batches, seed)),
            )
            for seed, task in enumerate(("math", "code"))
        ]


def order(batches, seed):
    return random.Random(seed).sample(range(batches), batches)


@pytest.fixture(scope="module", params=[pytest.param((12, 24), id="twelve times"), OFTEN])
def size(request):
    """How often a run is killed, and how many batches each of its tasks has."""
    return request.param


@pytest.fixture(scope="module")
def tasks(size):
    return Long(size[1])


@pytest.mark.parametrize("how", [{}, {"queue": 2}], ids=["at once", "in the background"])
def test_kills_at_random_calls_lose_and_repeat_nothing(size, tasks, truth, tmp_path, how):
    """Each run goes on from the last; what a reader saw once it sees after every later kill."""
    root, rng = tmp_path / "run.fs", random.Random(0)
    seen, kills = Seen(), 0
    while kills < size[0]:
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
    assert kills == size[0], "the run was over before it was killed often enough"
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
