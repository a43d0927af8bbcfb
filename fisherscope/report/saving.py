"""Writing a report: each file whole or not at all."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisherscope.analyses import Failed, Result, Skipped
from fisherscope.analyses.result import strict
from fisherscope.report.page import render

if TYPE_CHECKING:
    from fisherscope.analyses import Outcome
    from fisherscope.report.report import Report

FORMAT = "fisherscope-results"
SCHEMA_VERSION = 1
"""Version of ``results.json``; it grows when a key changes its meaning."""

_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")


def save(report: Report, directory: Path) -> Path:
    """Write page, results and tables of a report into a directory; see :meth:`Report.save`."""
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file: give a directory for the report")
    tables, files = _tables(report)
    results = json.dumps(results_json(report, files), allow_nan=False, ensure_ascii=False, indent=1)
    page = render(report, files)
    # everything is made before anything is written, so that an error leaves an earlier report as it was
    (directory / "tables").mkdir(parents=True, exist_ok=True)
    stale = _written_before(directory) - tables.keys()
    for name, text in tables.items():
        _write(directory / "tables" / name, text)
    _write(directory / "results.json", results + "\n")
    _write(directory / "report.html", page)
    for name in stale:
        (directory / "tables" / name).unlink(missing_ok=True)
    return directory


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
    config = report.config.to_dict()
    # options of other people's analyses may hold anything
    config["extra"] = json.loads(json.dumps(config["extra"], default=repr).replace("NaN", "null"))
    return strict(config)


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
        wanted = [
            (table, f"{table}.csv", frame.to_csv(index=False)) for table, frame in result.tables().items()
        ]
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
        old = json.loads((directory / "results.json").read_text(encoding="utf-8"))
        if old["format"] != FORMAT:
            return set()
        found = {file for outcome in old["analyses"].values() for file in outcome.get("files", {}).values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {file for file in found if isinstance(file, str) and not _UNSAFE.search(file)} - {".", ".."}


def _write(path: Path, text: str) -> None:
    """Write under a temporary name beside the target, then rename."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        # mkstemp makes files for their owner alone; a report is as public as the user's other files
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
