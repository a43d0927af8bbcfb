"""The files of a report."""

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import fisherscope as fs
from fisherscope.analyses import AnalyzeConfig
from fisherscope.report import Report, check_target, read_table
from fisherscope.report.csv_text import csv_of
from fisherscope.report.facts import shallow
from tests.analyses.synthetic import make_task, write_store
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


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("number", [0, 3, -1])
def test_a_failed_write_leaves_the_earlier_report(saved, tmp_path, monkeypatch, number):
    """A full disk at any of the files: all of the earlier report is as it was, no temporary file is left."""
    fs.analyze(saved.report.store_path, ["masks"], QUICK, quiet=True).save(tmp_path)
    before, files = contents(tmp_path), len(contents(saved.directory))
    written, write = [], Path.write_bytes

    def full(path, content):
        written.append(path)
        if len(written) == number % files + 1:
            write(path, content[:10])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        saved.report.save(tmp_path)
    assert contents(tmp_path) == before


def test_odd_provenance_and_options_are_saved(saved, tmp_path):
    """Half characters and what is nested a thousand deep, as a stranger's store may have it, stop nothing:
    the JSON is strict, the page is text, and what lies too deep is left out."""
    deep = "bottom"
    for _ in range(5000):
        deep = {"in": [deep]}
    odd = {"deep": deep, "half": "\ud800", "model_class": "M\udc80", "torch": deep, 7: float("nan")}
    facts = dataclasses.replace(
        saved.report.facts, provenance=shallow(odd), options=shallow({"deep": deep}), model="half \udfff"
    )
    config = dataclasses.replace(QUICK, extra={"other": {"deep": deep, "says": "NaN", "half": "\ud8ff"}})
    Report({"masks": saved.report["masks"]}, facts, config).save(tmp_path)
    whole = strict_json((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert whole["provenance"]["half"] == "\ud800"
    assert whole["provenance"]["7"] is None
    assert whole["config"]["extra"]["other"]["says"] == "NaN"
    assert "bottom" not in (tmp_path / "results.json").read_text(encoding="utf-8")
    assert "half \\udfff" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_made_leaves_the_earlier_report(saved, tmp_path):
    """Whatever goes wrong while the texts are made, nothing was touched."""
    saved.report.save(tmp_path)
    before = contents(tmp_path)
    deep = {}
    for _ in range(100_000):
        deep = {"in": deep}
    facts = dataclasses.replace(saved.report.facts, provenance=deep)
    with pytest.raises(RecursionError):
        Report(dict(saved.report.outcomes), facts, QUICK).save(tmp_path)
    assert contents(tmp_path) == before


def test_what_a_killed_save_left_goes_away(saved, tmp_path):
    """Temporary names of a process that is gone, and those of former versions; another one's that runs, and
    files of other people, stay."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    left, running = tmp_path / f".fisherscope-{gone.pid}-ab12.tmp", tmp_path / ".fisherscope-1-ab12.tmp"
    for directory in (left, running, tmp_path / "tables"):
        directory.mkdir()
        (directory / "0").write_text("half")
    former = [".report.html.abcd1234.tmp", ".results.json.abc_1234.tmp", "tables/.masks.csv.abcd1234.tmp"]
    for name in [*former, ".mine.tmp"]:
        (tmp_path / name).write_text("half")
    fs.analyze(saved.report.store_path, ["masks"], QUICK, quiet=True).save(tmp_path)
    assert not left.exists()
    assert not [name for name in former if (tmp_path / name).exists()]
    assert (running / "0").read_text() == (tmp_path / ".mine.tmp").read_text() == "half"


def test_a_killed_save_leaves_the_earlier_report(saved, tmp_path):
    """A kill before the last file is written; the next save removes what it left."""
    fs.analyze(saved.report.store_path, ["masks"], QUICK, quiet=True).save(tmp_path)
    before = contents(tmp_path)
    code = (
        "import os, pathlib\n"
        "from fisherscope.report.writing import put\n"
        "write = pathlib.Path.write_bytes\n"
        "pathlib.Path.write_bytes = lambda p, c: write(p, c) if p.name == '0' else os.kill(os.getpid(), 9)\n"
        f"put(pathlib.Path({str(tmp_path)!r}), {{'report.html': 'x' * 1000, 'results.json': 'y'}})\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    found = contents(tmp_path)
    assert {name: found[name] for name in before} == before
    assert len(found) == len(before) + 1
    saved.report.save(tmp_path)
    assert contents(tmp_path).keys() == contents(saved.directory).keys()


def test_a_page_alone(saved, tmp_path, capsys):
    """A name that ends with .html is that very file; it points to no tables."""
    page = tmp_path / "new" / "x.html"
    assert saved.report.save(page) == page
    assert [p.name for p in page.parent.iterdir()] == ["x.html"]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "All rows: " not in text
    assert "All rows: " in saved.page
    saved.report.save(page, quiet=True)
    assert page.read_text(encoding="utf-8") == text
    told = capsys.readouterr().err
    assert re.fullmatch(rf"report into {re.escape(str(page))}: \d+\.\d s\n", told)


def test_a_path_in_the_way(saved, tmp_path):
    """A file that is no page, and a directory with the name of a page: refused with what to do instead."""
    (tmp_path / "report").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"is a file: give a directory .* \.html"):
        saved.report.save(tmp_path / "report")
    assert (tmp_path / "report").read_text() == "mine"
    (tmp_path / "x.HTML").mkdir()
    with pytest.raises(
        IsADirectoryError, match=r"is a directory: give the name of a page, such as .*report\.html"
    ):
        saved.report.save(tmp_path / "x.HTML")
    assert list((tmp_path / "x.HTML").iterdir()) == []


def test_only_reports_are_written_over(saved, tmp_path):
    """What is asked before long work: a new or empty directory, a report, or what is left of one."""
    for name in ("new", "empty", "killed"):
        check_target(tmp_path / name, only_reports=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "killed" / "tables").mkdir(parents=True)
    (tmp_path / "killed" / ".fisherscope-1-ab12.tmp").mkdir()
    for path in (tmp_path / "empty", tmp_path / "killed", saved.directory, tmp_path / "page.html"):
        check_target(path, only_reports=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text('{"format": "somebody else\'s"}')
    with pytest.raises(
        FileExistsError, match=r"holds no report: give a new directory, such as .*other/report"
    ):
        check_target(tmp_path / "other", only_reports=True)


FORMULAS = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\tx",
    "\rx",
    "'quoted",
    "''=",
    "plain",
    "",
    "NA",
    "null",
    "-",
    "\u00e9",
]


def test_texts_are_no_formulas(tmp_path):
    """A spreadsheet runs no text of a table; numbers stay numbers; reading gives back what was there."""
    frame = pd.DataFrame(
        {"task": FORMULAS, "value": [-1.5 * i for i in range(len(FORMULAS))], "n": -7, "=x": "y"}
    )
    (tmp_path / "t.csv").write_text(csv_of(frame), encoding="utf-8", newline="")
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as stream:
        header, *rows = csv.reader(stream)
    cells = [*header, *(cell for row in rows for cell in (row[0], row[3]))]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert [row[1] for row in rows[1:3]] == ["-1.5", "-3.0"]
    assert {row[2] for row in rows} == {"-7"}
    again = read_table(tmp_path / "t.csv")
    assert again["task"].fillna("").tolist() == FORMULAS
    assert again.dtypes[["value", "n"]].tolist() == frame.dtypes[["value", "n"]].tolist()
    pd.testing.assert_frame_equal(again[["value", "n", "=x"]], frame[["value", "n", "=x"]], check_dtype=False)


def test_names_of_tasks_of_unknown_origin_are_no_formulas(layout, tmp_path):
    """A task whose name, out of a journal, is a formula: every table is defused and can be read back."""
    name = '=HYPERLINK("http://x","y")'
    tasks = {task: make_task(layout, task, 6, seed) for seed, task in enumerate((name, "@b"))}
    report = fs.analyze(write_store(tmp_path / "run.fs", layout, tasks).store, config=QUICK, quiet=True)
    assert not report.failed
    report.save(tmp_path / "report")
    for path in (tmp_path / "report" / "tables").glob("*.csv"):
        with path.open(encoding="utf-8", newline="") as stream:
            header, *rows = csv.reader(stream)
        number = re.compile(r"-?[\d.]+(e[+-]?\d+)?|-?inf")
        bad = [
            c
            for row in [header, *rows]
            for c in row
            if c[:1] in set("=+-@\t\r") and c and not number.fullmatch(c)
        ]
        assert bad == []
    assert set(read_table(tmp_path / "report" / "tables" / "fisher.csv")["task"]) == {name, "@b"}


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
