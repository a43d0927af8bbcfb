"""One small analyzed store, its report on disk, and stores of which something is missing."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

import fisherscope as fs
from fisherscope.analyses import REGISTRY, FisherConfig, ImportanceConfig, Result
from tests.analyses.synthetic import make_layout, make_task, write_store

HOSTILE = '<script>window.pwned=1</script><img src=x onerror="window.pwned=1">'

QUICK = fs.AnalyzeConfig(fisher=FisherConfig(bootstrap=20), importance=ImportanceConfig(bootstrap=20))


@dataclass
class Saved:
    """A report and where it was saved."""

    report: fs.Report
    directory: Path

    @property
    def page(self) -> str:
        return (self.directory / "report.html").read_text(encoding="utf-8")


def save(store, directory, **options):
    report = fs.analyze(store, config=QUICK, **options)
    return Saved(report, report.save(directory))


@pytest.fixture(scope="session")
def layout():
    return make_layout()


@pytest.fixture(scope="session")
def tasks(layout):
    """Three tasks; the texts of one are hostile, those of another long."""
    found = {name: make_task(layout, name, n, n) for name, n in (("math", 8), ("code", 7), ("flipped", 6))}
    found["math"] = dataclasses.replace(found["math"], text=[f"{HOSTILE} & sum {i}" for i in range(8)])
    found["code"] = dataclasses.replace(found["code"], text=[f"long \u2028 text {i} " * 60 for i in range(7)])
    return found


@pytest.fixture(scope="session")
def saved(layout, tasks, tmp_path_factory):
    """Everything collected, everything analyzed."""
    path = tmp_path_factory.mktemp("whole")
    return save(write_store(path / "run.fs", layout, tasks).store, path / "report")


@pytest.fixture(scope="session")
def lean(layout, tasks, tmp_path_factory):
    """Neither texts nor sample gradients: two analyses are skipped."""
    path = tmp_path_factory.mktemp("lean")
    made = write_store(path / "run.fs", layout, tasks, fisher_shape="groups", gradients=False, text=False)
    return save(made.store, path / "report")


@pytest.fixture
def plugin():
    """Registers analyses for one test: ``plugin(name, function)``."""
    names = []

    def add(name, function):
        REGISTRY.register(name)(function)
        names.append(name)

    yield add
    for name in names:
        del REGISTRY.analyses[name]


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Plain(Result):
    """A result of somebody else's: no figures are known for it."""

    def top(self, k=10):
        return self.frame.head(k)

    def summary(self):
        return "Losses were counted."
