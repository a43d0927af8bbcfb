"""Writing a report: all of it, or nothing."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisherscope.analyses import Failed, Result, Skipped
from fisherscope.analyses.result import strict
from fisherscope.report.csv_text import csv_of
from fisherscope.report.facts import shallow
from fisherscope.report.page import render
from fisherscope.report.writing import is_left_over, put

if TYPE_CHECKING:
    from fisherscope.analyses import Outcome
    from fisherscope.report.report import Report

FORMAT = "fisherscope-results"
SCHEMA_VERSION = 1
"""Version of ``results.json``; it grows when a key changes its meaning."""

_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")


PAGES = (".html", ".htm")
"""Endings of paths that are the page itself and no directory."""


def save(report: Report, path: Path, tell: Callable[[str], None]) -> Path:
    """Write a report into a directory, or its page alone into a file; see :meth:`Report.save`."""
    check_target(path)
    if path.suffix.lower() in PAGES:
        tell("page")
        page = render(report, {})
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path.parent, {path.name: page})
        return path
    # everything is made before anything is written, so that an error leaves an earlier report as it was
    tell("tables")
    tables, files = _tables(report)
    tell("results")
    results = json.dumps(results_json(report, files), allow_nan=False, ensure_ascii=False, indent=1)
    tell("page")
    page = render(report, files)
    tell("files")
    path.mkdir(parents=True, exist_ok=True)
    (path / "tables").mkdir(exist_ok=True)
    stale = _written_before(path) - tables.keys()
    named = {f"tables/{name}": text for name, text in tables.items()}
    put(path, {**named, "results.json": results + "\n", "report.html": page})
    for name in stale:
        (path / "tables" / name).unlink(missing_ok=True)
    return path


def check_target(path: Path, *, only_reports: bool = False) -> None:
    """Refuse a path that no report can be saved to.

    Args:
        path: a directory, or a page (a name that ends with ``.html``).
        only_reports: refuse a directory with other things in it, too, where there is no report.

    Raises:
        NotADirectoryError: it is a file, and no page.
        IsADirectoryError: it is a directory with the name of a page.
        FileExistsError: it is a directory of other things, or a file that is no report of this program.
    """
    if path.suffix.lower() in PAGES:
        if path.is_dir():
            raise IsADirectoryError(
                f"{path} is a directory: give the name of a page, such as {path / 'report.html'}, or a "
                "directory whose name does not end with .html"
            )
    elif path.exists() and not path.is_dir():
        raise NotADirectoryError(
            f"{path} is a file: give a directory for the report, or a name that ends with .html for its page "
            "alone"
        )
    elif only_reports and path.is_dir() and not _is_report(path):
        raise FileExistsError(
            f"{path} is a directory of other things, and holds no report: give a new directory, such as "
            f"{path / 'report'}"
        )


def _is_report(directory: Path) -> bool:
    """Whether a directory is empty but for a report, or what is left of one."""
    if all(is_left_over(path) or path.name == "tables" for path in directory.iterdir()):
        return True
    return _former_results(directory) is not None


def results_json(report: Report, files: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The content of ``results.json``.

    Args:
        report: the report.
        files: per analysis, name of a table or further file -> file name under ``tables/``.

    Returns:
        Plain data without NaN: ``format``, ``schema_version``, ``config`` (what ``analyze --config`` takes),
        the run (``store``, ``model``, ``tasks``, ``coverage``, ``provenance``) and ``analyses``: per name
        a ``status``, and the result with its ``files``, or the ``reason``, or the ``error``.
    """
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        **strict(report.facts.to_json()),
        "config": _config(report),
        "analyses": {name: _outcome(o, files.get(name, {})) for name, o in report.outcomes.items()},
    }


def _config(report: Report) -> Any:
    # options of other people's analyses may hold anything
    config = dataclasses.replace(report.config, extra={}).to_dict()
    extra = json.dumps(shallow(dict(report.config.extra)), default=repr)
    return strict({**config, "extra": json.loads(extra)})


def _outcome(outcome: Outcome, files: dict[str, str]) -> dict[str, Any]:
    if isinstance(outcome, Result):
        return {"status": "ok", **strict(outcome.to_json()), "files": files}
    if isinstance(outcome, Skipped):
        return {"status": "skipped", "reason": outcome.reason}
    assert isinstance(outcome, Failed)
    return {"status": "failed", "error": outcome.error, "traceback": outcome.traceback}


def _tables(report: Report) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Texts by file name, and per analysis the file of each table and of each further file."""
    texts: dict[str, str] = {}
    files: dict[str, dict[str, str]] = {}
    for name, result in report.items():
        files[name] = {}
        wanted = [(table, f"{table}.csv", csv_of(frame)) for table, frame in result.tables().items()]
        further = {f"{result.name}_{file}": text for file, text in result.files().items()}
        wanted += [(file, file, text) for file, text in further.items()]
        for key, file, text in wanted:
            place = _free(file, texts)
            texts[place] = text
            files[name][key if key not in files[name] else place] = place
    return texts, files


def _free(wanted: str, taken: Iterable[str]) -> str:
    """A file name that is safe and not taken, whatever the case of its letters."""
    stem, dot, ending = _UNSAFE.sub("_", wanted).rpartition(".")
    stem = (stem if dot else ending).strip(".") or "table"
    ending = dot and f".{ending}"
    known = {name.lower() for name in taken}
    name, number = f"{stem}{ending}", 2
    while name.lower() in known:
        name, number = f"{stem}_{number}{ending}", number + 1
    return name


def _written_before(directory: Path) -> set[str]:
    """Tables and further files that an earlier report in this directory lists as its own."""
    try:
        old = (_former_results(directory) or {"analyses": {}})["analyses"]
        found = {file for outcome in old.values() for file in outcome.get("files", {}).values()}
    except (KeyError, TypeError, AttributeError):
        return set()
    return {file for file in found if isinstance(file, str) and not _UNSAFE.search(file)} - {".", ".."}


def _former_results(directory: Path) -> dict[str, Any] | None:
    """The ``results.json`` of an earlier report in this directory, if it is one."""
    try:
        old = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return old if isinstance(old, dict) and old.get("format") == FORMAT else None
