"""The files of a report."""

import io
import json
import os

import pandas as pd
import pytest

import fisherscope as fs
from fisherscope.analyses import AnalyzeConfig
from fisherscope.report import saving
from tests.report.conftest import QUICK, Plain


def strict_json(text):
    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_the_files(saved):
    """A page, the results, a file for every table and further file of every result, and nothing else."""
    found = {str(p.relative_to(saved.directory)) for p in saved.directory.rglob("*") if p.is_file()}
    tables = {f"tables/{name}.csv" for result in saved.report.values() for name in result.tables()}
    further = {f"tables/{result.name}_{file}" for result in saved.report.values() for file in result.files()}
    assert further == {"tables/conflict_weights.jsonl"}
    assert found == {"report.html", "results.json", *tables, *further}
    for result in saved.report.values():
        for name, frame in result.tables().items():
            read = pd.read_csv(saved.directory / "tables" / f"{name}.csv")
            assert (len(read), list(read.columns)) == (len(frame), list(frame.columns))


def test_results_are_strict_json(saved, lean):
    """No NaN anywhere; every analysis is there with its status, its result or the reason why not."""
    whole = strict_json((saved.directory / "results.json").read_text(encoding="utf-8"))
    assert (whole["format"], whole["schema_version"]) == ("fisherscope-results", 1)
    assert list(whole["analyses"]) == list(saved.report.outcomes)
    for name, entry in whole["analyses"].items():
        assert entry["status"] == "ok"
        assert entry["tables"][name]["total"] == len(saved.report[name].frame)
        result = saved.report[name]
        further = {f"{name}_{file}": f"{name}_{file}" for file in result.files()}
        assert entry["files"] == {table: f"{table}.csv" for table in result.tables()} | further
    assert whole["model"]["kv_heads"] == [2]
    assert [task["samples"] for task in whole["tasks"]] == [8, 7, 6]
    bare = strict_json((lean.directory / "results.json").read_text(encoding="utf-8"))
    assert bare["analyses"]["conflict"]["status"] == "skipped"
    assert "SampleGradients" in bare["analyses"]["conflict"]["reason"]


def test_the_options_can_be_used_again(saved):
    """``config`` in results.json is what :meth:`AnalyzeConfig.from_dict` reads."""
    whole = strict_json((saved.directory / "results.json").read_text(encoding="utf-8"))
    assert AnalyzeConfig.from_dict(whole["config"]) == QUICK


def test_saving_again_gives_the_same_bytes(saved, tmp_path):
    """Nothing in a report depends on when or how often it is written."""
    saved.report.save(tmp_path / "again")
    saved.report.save(tmp_path / "again")
    for path in saved.directory.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(saved.directory)).read_bytes() == path.read_bytes()


def test_tables_of_an_earlier_report_go_and_other_files_stay(saved, tmp_path):
    """A smaller report leaves no stale table behind and touches nothing that is not its own."""
    saved.report.save(tmp_path)
    (tmp_path / "tables" / "mine.csv").write_text("1\n")
    (tmp_path / "notes.txt").write_text("keep")
    fs.analyze(saved.report.store_path, ["masks"], QUICK).save(tmp_path)
    left = {path.name for path in (tmp_path / "tables").iterdir()}
    assert left == {"masks.csv", "masks_heads.csv", "masks_parameters.csv", "mine.csv"}
    assert (tmp_path / "notes.txt").read_text() == "keep"


class Further(Plain):
    """A result with files that are no tables."""

    def files(self):
        return {"weights.jsonl": '{"é": 1}\n', "../../up": "1", "x.csv": "mine"}


def test_further_files_are_written_listed_and_replaced(saved, plugin, tmp_path):
    """Text files of a result stand beside its tables under safe names of their own; stale ones go."""
    frame = pd.DataFrame({"x": [1]})
    plugin("odd", lambda *given: Further(name="odd", config={}, frame=frame, extra={"x": frame}))
    fs.analyze(saved.report.store_path, ["odd"], QUICK).save(tmp_path)
    left = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "tables").iterdir()}
    assert left == {
        "odd.csv": "x\n1\n", "odd_x.csv": "x\n1\n", "odd_weights.jsonl": '{"é": 1}\n', "odd_.._._up": "1",
        "odd_x_2.csv": "mine",
    }  # fmt: skip
    whole = strict_json((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert whole["analyses"]["odd"]["files"]["odd_weights.jsonl"] == "odd_weights.jsonl"
    assert set(whole["analyses"]["odd"]["files"].values()) == set(left)
    assert all(f"tables/{name}" in (tmp_path / "report.html").read_text(encoding="utf-8") for name in left)
    (tmp_path / "tables" / "mine.jsonl").write_text("1\n")
    fs.analyze(saved.report.store_path, ["masks"], QUICK).save(tmp_path)
    files = {path.name for path in (tmp_path / "tables").iterdir()}
    assert "mine.jsonl" in files
    assert not files & set(left)


def test_files_that_cannot_be_made_are_a_failure_of_the_analysis(saved, plugin, tmp_path):
    """A result whose files raise has failed; the others are saved."""

    class Broken(Plain):
        def files(self):
            raise RuntimeError("no ink")

    plugin("broken", lambda *given: Broken(name="broken", config={}, frame=pd.DataFrame({"x": [1]})))
    report = fs.analyze(saved.report.store_path, ["broken", "masks"], QUICK)
    assert report.failed == {"broken": "RuntimeError: no ink"}
    report.save(tmp_path)
    assert (tmp_path / "tables" / "masks.csv").exists()


def test_a_failed_write_leaves_the_earlier_report(saved, tmp_path, monkeypatch):
    """A full disk in the middle of a file: the old file is whole, no temporary file is left."""
    saved.report.save(tmp_path)
    before = (tmp_path / "report.html").read_bytes()

    def full(*arguments, **options):
        handle = io.StringIO()
        handle.write = lambda text: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        os.close(arguments[0])
        return handle

    monkeypatch.setattr(saving.os, "fdopen", full)
    with pytest.raises(OSError, match="No space left"):
        saved.report.save(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


def test_a_file_in_the_way(saved, tmp_path):
    """A path that is a file is refused by name."""
    (tmp_path / "report").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        saved.report.save(tmp_path / "report")


def test_odd_names_of_tables(saved, plugin, tmp_path):
    """A plugin's table names cannot leave the directory or replace each other."""

    def odd(store, config, context):
        frame = pd.DataFrame({"x": [1, float("nan")]})
        return Plain(name="../../up", config={}, frame=frame, extra={"a/b": frame, "a b": frame})

    plugin("odd", odd)
    fs.analyze(saved.report.store_path, ["odd"], QUICK).save(tmp_path / "deep" / "report")
    files = [str(p.relative_to(tmp_path / "deep" / "report")) for p in tmp_path.rglob("*.csv")]
    assert len(files) == 3
    assert all(name.startswith("tables") and name.count(os.sep) == 1 for name in files)
