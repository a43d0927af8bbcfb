"""The object that holds the outcomes."""

import math

import pandas as pd
import pytest

import fisherscope as fs
from fisherscope.analyses import AnalyzeConfig
from fisherscope.errors import StoreFormatError
from tests.report.conftest import QUICK, Plain

NAMES = ["fisher", "importance", "masks", "overlap", "conflict", "interference"]


def test_a_mapping_of_results_in_the_order_they_ran(saved):
    """``report[name]`` is a result, names come in run order, and nothing failed here."""
    report = saved.report
    assert list(report) == NAMES == list(report.outcomes)
    assert len(report) == 6
    assert len(report["interference"].top(10)) == 10
    assert (report.failed, report.skipped) == ({}, {})
    assert report.store_path.name == "run.fs"


def test_a_path_and_chosen_analyses(saved):
    """A path is as good as a store; analyses run in the order asked for."""
    report = fs.analyze(str(saved.report.store_path), ["masks", "fisher"], QUICK)
    assert list(report) == ["masks", "fisher"]
    with pytest.raises(KeyError, match="was not run"):
        report["conflict"]


def test_what_was_skipped_says_what_to_collect(lean):
    """A skipped analysis is no result, and asking for it says what to collect."""
    report = lean.report
    assert list(report) == ["fisher", "importance", "masks", "overlap"]
    assert set(report.skipped) == {"conflict", "interference"}
    assert "conflict" not in report
    with pytest.raises(KeyError, match="SampleGradients"):
        report["conflict"]


def test_what_failed_says_why(saved, plugin):
    """A failing analysis stops no other, and asking for it gives its error."""

    def broken(store, config, context):
        raise RuntimeError("the moon is full")

    plugin("broken", broken)
    report = fs.analyze(saved.report.store_path, ["broken", "fisher"], QUICK)
    assert report.failed == {"broken": "RuntimeError: the moon is full"}
    assert list(report) == ["fisher"]
    with pytest.raises(KeyError, match="the moon is full"):
        report["broken"]


def test_a_result_that_cannot_be_shown_has_failed(saved, plugin):
    """A plugin whose summary raises is a failure, not the end of the whole report."""

    class Mute(Plain):
        def summary(self):
            raise ValueError("lost for words")

    plugin("mute", lambda store, config, context: Mute(name="mute", config={}, frame=pd.DataFrame()))
    report = fs.analyze(saved.report.store_path, ["mute"], QUICK)
    assert report.failed == {"mute": "ValueError: lost for words"}


def test_words(saved, lean):
    """The summary has a paragraph for each analysis, skipped ones included; notebooks get a short table."""
    assert [part.split("\n")[0] for part in saved.report.summary().split("\n\n")] == NAMES
    assert "skipped: " in lean.report.summary()
    shown = lean.report._repr_html_()
    assert shown.count("<tr>") == 7
    assert len(shown) < 4000
    assert "conflict: skipped" in repr(lean.report)


def test_bad_input(saved, tmp_path):
    """No store, no such task, no such analysis: each is said by name."""
    with pytest.raises(StoreFormatError, match="not a fisherscope store"):
        fs.analyze(tmp_path)
    with pytest.raises(ValueError, match="no task 'physics'"):
        fs.analyze(saved.report.store_path, config=AnalyzeConfig(tasks=("physics",)))
    with pytest.raises(ValueError, match="no analysis 'astrology'"):
        fs.analyze(saved.report.store_path, ["astrology"])


def test_facts_are_counted_from_the_store(saved, layout):
    """Samples per task, and weights per kind of parameter: all, instrumented, with gradients."""
    facts = saved.report.facts
    assert facts.tasks["samples"].tolist() == [8, 7, 6]
    sizes = {info.name: math.prod(info.shape) for info in layout.parameters}
    cover = facts.coverage.set_index("kind")
    assert cover["weights"].sum() == sum(sizes.values())
    assert facts.left_out == ("embed.weight",)
    assert cover["weights_instrumented"].sum() == sum(sizes.values()) - sizes["embed.weight"]
    assert cover["weights_with_gradients"].to_dict()["mlp"] == 0
    assert cover.loc["attention", "weights"] == cover.loc["attention", "weights_with_gradients"]
    one = fs.analyze(facts.store_path, ["masks"], AnalyzeConfig(tasks=("code",))).facts
    assert one.tasks["task"].tolist() == ["code"]
