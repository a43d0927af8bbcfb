"""show_versions says what a bug report needs, without paths; there is one version everywhere."""

import datetime as dt
import re
import tomllib
from pathlib import Path

import yaml

import fisherscope
from fisherscope.versions import show_versions

ROOT = Path(__file__).resolve().parent.parent


def test_one_version_and_one_date():
    """pyproject.toml, the package, CITATION.cff and the newest release in the changelog agree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    version, date = re.fullmatch(r"\[([\d.]+)\] - (\d{4}-\d\d-\d\d)", headings[1]).groups()
    assert {project["version"], fisherscope.__version__, str(citation["version"])} == {version}
    assert str(citation["date-released"]) == dt.date.fromisoformat(date).isoformat()
    assert f"[{version}]: #" in changelog


def test_as_dict():
    """Versions by name; None for what is not installed."""
    versions = show_versions(as_dict=True)
    assert versions["fisherscope"] == fisherscope.__version__
    assert versions["torch"].startswith("2.")
    assert set(versions) >= {"python", "platform", "transformers", "h5py", "numpy", "torchvision", "device"}


def test_printed(capsys):
    """One line each, in the same order, without paths."""
    assert show_versions() is None
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == list(show_versions(as_dict=True))
    assert str(Path.home()) not in printed
