"""Stores for the tests of the store."""

import os

import pytest

from tests.store.contents import TwoTasks
from tests.store.store_cases import Run, header_of, small_layout, toy_layout


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """What counts here is which syncs are asked for and in which order, not how long the medium takes."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="session")
def toy():
    """A run over the layout with every kind of parameter."""
    return Run(header_of(toy_layout()))


@pytest.fixture(scope="session")
def small():
    """A run with few datasets and four samples."""
    return Run(header_of(small_layout()), n=4, batches=((3, 1), (0, 2)))


@pytest.fixture
def root(tmp_path):
    """A directory that does not exist yet."""
    return tmp_path / "run.fs"


@pytest.fixture(scope="module")
def tasks():
    """A run over two tasks whose content is known."""
    return TwoTasks()


@pytest.fixture(scope="module")
def truth(tasks, tmp_path_factory):
    """Every sample and every state of the aggregates of a run that nothing disturbs."""
    return tasks.states(tmp_path_factory.mktemp("truth") / "run.fs")
