"""Stores that the tests of the analyses share."""

import pytest

from fisherscope.layout import ModelLayout
from tests.analyses.synthetic import Made, make_layout, make_task, write_store


@pytest.fixture(scope="session")
def layout() -> ModelLayout:
    return make_layout()


@pytest.fixture(scope="session")
def made(layout, tmp_path_factory) -> Made:
    """Two tasks of 12 and 9 samples with everything collected."""
    tasks = {"math": make_task(layout, "math", 12, 1), "code": make_task(layout, "code", 9, 2)}
    return write_store(tmp_path_factory.mktemp("full") / "run.fs", layout, tasks)


@pytest.fixture(scope="session")
def lean(layout, made, tmp_path_factory) -> Made:
    """The same samples without full-shape F."""
    return write_store(tmp_path_factory.mktemp("lean") / "run.fs", layout, made.tasks, fisher_shape="groups")


@pytest.fixture(scope="session")
def bare(layout, made, tmp_path_factory) -> Made:
    """The same samples with group values only."""
    path = tmp_path_factory.mktemp("bare") / "run.fs"
    return write_store(path, layout, made.tasks, fisher_shape="groups", gradients=False, text=False)
