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
    """A page, the results, a table for every table of every result, and nothing else."""
    found = {str(p.relative_to(saved.directory)) for p in saved.directory.rglob("*") if p.is_file()}
    tables = {f"tables/{name}.csv" for result in saved.report.values() for name in result.tables()}
    assert found == {"report.html", "results.json", *tables}
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
        assert set(entry["files"]) == set(saved.report[name].tables())
    assert whole["model"]["kv_heads"] == [2]
    assert [task["samples"] for task in whole["tasks"]] == [8, 7, 6]
    bare = strict_json((lean.directory / "results.json").read_text(encoding="utf-8"))
    assert bare["analyses"]["conflict"]["status"] == "skipped"
    assert "sample_gradients" in bare["analyses"]["conflict"]["reason"]


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
