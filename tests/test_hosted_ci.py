"""The file of the hosted CI is valid, calls targets that exist, and covers what the metadata promises."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def test_every_target_exists(workflow):
    """Each job ends by calling make, and only with targets that the Makefile has."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for name, job in workflow["jobs"].items():
        called = [re.search(r"\bmake ([a-z-]+)", command) for command in commands(job)]
        called = {match[1] for match in called if match}
        assert called, name
        assert called <= targets, name


def test_what_is_covered(workflow):
    """Lint; every Python of the classifiers; the lowest versions must pass, the newest may fail."""
    jobs = workflow["jobs"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    prefix = "Programming Language :: Python :: "
    promised = [line.removeprefix(prefix) for line in project["classifiers"] if line.startswith(prefix)]
    assert jobs["test"]["strategy"]["matrix"]["python"] == promised
    assert "make check" in commands(jobs["lint"])
    assert any(line.startswith("make test-oldest") for line in commands(jobs["oldest"]))
    assert any(line.startswith("make test-newest") for line in commands(jobs["newest"]))
    assert [name for name, job in jobs.items() if job.get("continue-on-error")] == ["newest"]
    assert any("chromium" in line for line in commands(jobs["test"]))


def test_no_index_is_named(workflow):
    """Where packages come from is the repository's variable, so that forks and mirrors work."""
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "://" not in text
    assert workflow["env"] == {"PIP_EXTRA_INDEX_URL": "${{ vars.PIP_EXTRA_INDEX_URL }}"}
