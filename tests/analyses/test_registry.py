"""The registry, and running what is in it."""

from dataclasses import dataclass

import pandas as pd
import pytest

from fisherscope import analyses
from fisherscope.analyses import AnalyzeConfig, Failed, Registry, Result, Skipped, run
from fisherscope.errors import Interrupted
from fisherscope.store import open_store
from tests.analyses.synthetic import make_task, write_store

BUILT_IN = ["fisher", "importance", "masks", "overlap", "conflict", "interference"]


@dataclass(frozen=True)
class Options:
    size: int = 3


@dataclass(kw_only=True, eq=False, repr=False)
class Plain(Result):
    def top(self, k=10):
        return self.frame.head(k)

    def summary(self):
        return "nothing"


def plain(name, **columns):
    return Plain(name=name, config={}, frame=pd.DataFrame(columns))


@pytest.fixture
def registry():
    return Registry(dict(analyses.REGISTRY.analyses))


def test_built_in_order():
    """The built-in analyses run in a fixed order."""
    assert analyses.REGISTRY.names()[: len(BUILT_IN)] == BUILT_IN


def test_an_analysis_of_a_user_runs_with_its_options(made, registry):
    """Registered by decorator, found by name, given the store, its own options and the context."""

    @registry.register("mine", requires=("fisher",), config=Options)
    def mine(store, config, context):
        """One line.

        More.
        """
        return plain("mine", task=list(context.tasks), size=config.size)

    assert registry.get("mine").description == "One line."
    for extra, size in (({}, 3), ({"mine": Options(5)}, 5), ({"mine": {"size": 7}}, 7)):
        outcome = run(made.store, ["mine"], AnalyzeConfig(extra=extra), registry=registry)["mine"]
        assert outcome.frame["size"].tolist() == [size, size]


def test_wrong_options_of_a_user_fail_with_their_names(made, registry):
    """Unknown fields and objects of another kind are errors in that analysis's section."""
    registry.register("mine", config=Options)(lambda store, config, context: plain("mine"))
    for extra, text in (({"mine": {"sise": 1}}, "sise"), ({"mine": 3}, "Options")):
        outcome = run(made.store, ["mine"], AnalyzeConfig(extra=extra), registry=registry)["mine"]
        assert isinstance(outcome, Failed)
        assert text in outcome.error


def test_names_are_unique_and_quantities_known(registry):
    """A second analysis of a name, or a requirement nobody knows, is refused."""
    with pytest.raises(ValueError, match="'fisher' is already registered"):
        registry.register("fisher")
    with pytest.raises(ValueError, match="unknown quantity 'gradient'"):
        registry.register("mine", requires=("gradient",))
    registry.register("fisher", replace=True)(lambda store, config, context: plain("fisher"))


def test_unknown_names_list_known_ones(made):
    """An unknown analysis or task is an error that lists what there is, before anything runs."""
    with pytest.raises(ValueError, match="no analysis 'fishr': choose from fisher, importance"):
        run(made.store, ["fishr"])
    with pytest.raises(ValueError, match="no task 'mth': it has math, code"):
        run(made.store, ["fisher"], AnalyzeConfig(tasks=("mth",)))


def test_missing_data_is_skipped_with_what_to_collect(bare):
    """Group values alone answer four analyses; the others say what to collect."""
    outcomes = run(bare.store)
    for name in ("fisher", "importance", "masks", "overlap"):
        assert isinstance(outcomes[name], Result), outcomes[name]
    for name in ("conflict", "interference"):
        assert isinstance(outcomes[name], Skipped)
        assert "SampleGradients" in outcomes[name].reason
        assert "scope.collect" in outcomes[name].reason


def test_a_failing_analysis_does_not_stop_the_others(made, registry, caplog):
    """Its outcome holds error and traceback, it is logged, and the rest runs."""

    @registry.register("broken")
    def broken(store, config, context):
        raise ZeroDivisionError("no such thing")

    @registry.register("on_top")
    def on_top(store, config, context):
        return context.result("broken")

    outcomes = run(made.store, ["broken", "on_top", "fisher"], registry=registry)
    assert outcomes["broken"].error == "ZeroDivisionError: no such thing"
    assert "in broken" in outcomes["broken"].traceback
    assert isinstance(outcomes["on_top"], Failed)
    assert "no such thing" in outcomes["on_top"].error
    assert isinstance(outcomes["fisher"], Result)
    assert "no such thing" in caplog.text


def test_an_interruption_is_no_failure(made, registry):
    """A signal ends the run; it is not recorded as an error of the analysis."""

    @registry.register("stopped")
    def stopped(store, config, context):
        raise Interrupted("stopped", 15)

    with pytest.raises(Interrupted):
        run(made.store, ["stopped"], registry=registry)


def test_analyses_share_results_and_cannot_wait_for_each_other(made, registry):
    """A result that others build on is computed once; a circle is an error."""
    calls = []

    @registry.register("base")
    def base(store, config, context):
        calls.append(1)
        return plain("base")

    registry.register("user")(lambda store, config, context: context.result("base"))
    run(made.store, ["user", "base"], registry=registry)
    assert len(calls) == 1
    registry.register("a")(lambda store, config, context: context.result("b"))
    registry.register("b")(lambda store, config, context: context.result("a"))
    outcomes = run(made.store, ["a"], registry=registry)
    assert "wait for each other" in outcomes["a"].error


def test_comparing_needs_two_tasks(made):
    """With one task the comparing analyses are skipped with the reason; that is no failure."""
    outcomes = run(made.store, config=AnalyzeConfig(tasks=("math",)))
    for name in ("overlap", "conflict", "interference"):
        assert isinstance(outcomes[name], Skipped)
        assert "'math'" in outcomes[name].reason or "math" in outcomes[name].reason
        assert "another task" in outcomes[name].reason
    for name in ("fisher", "importance", "masks"):
        assert isinstance(outcomes[name], Result)


def test_single_sample_and_incomplete_tasks_warn(layout, tmp_path):
    """Every analysis still answers, and says that the variance is undefined or samples are missing."""
    tasks = {name: make_task(layout, name, n, n) for name, n in (("one", 1), ("some", 6), ("none", 3))}
    made = write_store(tmp_path / "run.fs", layout, tasks, commit={"some": 4, "none": 0})
    for name, outcome in run(made.store).items():
        assert isinstance(outcome, Result), outcome
        text = " ".join(outcome.warnings)
        assert "'one' has a single sample: variance" in text, name
        assert "'some' is not completely collected (4 of 6 samples)" in text
        assert "'none' has no samples in the store and is left out" in text
        outcome.to_json()
        outcome.summary()
    rows = run(made.store, ["fisher"])["fisher"].frame
    one = rows[rows["task"] == "one"]
    assert one[["variance", "ci_low", "bootstrap_low"]].isna().to_numpy().all()
    assert one["mean"].notna().all()


def test_entry_points_are_loaded_at_the_first_lookup(monkeypatch):
    """Other packages add analyses by an entry point; one that cannot load warns and is left out."""

    class Point:
        def __init__(self, name, load):
            self.name, self.value, self.load = name, f"package:{name}", load

    registry = Registry()

    def good():
        registry.register("theirs")(lambda store, config, context: plain("theirs"))

    def bad():
        raise ImportError("no such module")

    def points(group):
        assert group == "fisherscope.analyses"
        return [Point("theirs", good), Point("broken", bad)]

    monkeypatch.setattr("fisherscope.plugins.entry_points", points)
    with pytest.warns(UserWarning, match="cannot load 'broken' of 'package:broken'"):
        assert registry.names() == ["theirs"]
    assert registry.names() == ["theirs"]


def test_a_snapshot_that_lags_behind_is_said(layout, tmp_path):
    """Results say of how many samples the aggregates are, where a journal lost its last line."""
    tasks = {"math": make_task(layout, "math", 12, 1)}
    made = write_store(tmp_path / "run.fs", layout, tasks)
    path = made.store.path / "journal" / "r0000.journal"
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if b'"kind":"snapshot"' not in line]
    assert len(kept) == len(lines) - 1
    number = next(k for k, line in enumerate(lines) if b'"kind":"snapshot"' in line)
    path.write_bytes(b"".join(lines[:number]))
    result = run(open_store(made.store.path), ["fisher"])["fisher"]
    assert any(
        "aggregates of task 'math'" in note and "are those of 0 of its 12 samples" in note
        for note in result.warnings
    )
