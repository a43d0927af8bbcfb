"""Write constraints.txt and constraints-oldest.txt: every package of the environment, with its version.

Run it by ``make constraints``, with the oldest supported Python and an index of packages within reach.
Nothing is installed: pip resolves what the extras need and reports it. What the head of constraints.txt
pins by hand stays; below it, what pip found takes the place of what stood there. constraints-oldest.txt
pins what pyproject.toml names as the lowest versions, and whatever goes with them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = "# ---- below: written by `make constraints` ----\n"
OLDEST = """\
# The lowest version that pyproject.toml admits of every dependency, and what goes with it.
# Written by `make constraints`, tried by `make test-oldest`.
"""
# "backpack" is installed without its dependencies, which include torchvision.
EXTRAS = ("dev", "docs", "peft", "datasets")
# Debian 12 has Python 3.11.2: what asks for a later patch release is not to be had there.
PATCH = 2
# What builds and installs this package.
TOOLS = ("pip", "hatchling", "editables")
# What runs the tests, in the same version in both environments.
RUNNERS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "playwright")
# Each is chosen by hand, with the reason, in the head of constraints.txt.
BY_HAND = ("torch", "backpack-for-pytorch", "einops", "unfoldnd")


def canonical(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """Versions that a constraints file pins with ``==``, by canonical name."""
    found = re.findall(r"^([\w.-]+)==([\w.!]+)\s*(?:#.*)?$", text, re.MULTILINE)
    return {canonical(name): version for name, version in found}


def lowest(project: dict[str, Any]) -> dict[str, str]:
    """The lowest versions that the metadata admits of what the package runs with, by canonical name.

    Raises:
        ValueError: a dependency has no lower bound.
    """
    extras = project["optional-dependencies"]
    found = {}
    for requirement in [*project["dependencies"], *extras["peft"], *extras["datasets"]]:
        match = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
        if match is None:
            raise ValueError(
                f"pyproject.toml names no lowest version in {requirement!r}: write name>=version"
            )
        found[canonical(match[1])] = match[2]
    return found


def resolved(report: dict[str, Any]) -> dict[str, str]:
    """Versions in a report of pip, by canonical name, without this package and without the names of builds.

    Raises:
        ValueError: torchvision is among them, or a package that needs a later Python 3.11 than Debian 12 has.
    """
    found = {}
    for item in report["install"]:
        name, version = canonical(item["metadata"]["name"]), item["metadata"]["version"]
        found[name] = version.partition("+")[0]
        needs = re.search(r">=\s*3\.11\.(\d+)", item["metadata"].get("requires_python") or "")
        if needs is not None and int(needs[1]) > PATCH:
            raise ValueError(
                f"{name} {version} needs Python 3.11.{needs[1]}, and Debian 12 has 3.11.{PATCH}: "
                "pin an earlier version by hand in the head of constraints.txt"
            )
    found.pop("fisherscope", None)
    if "torchvision" in found:
        raise ValueError(
            "torchvision would be installed, and another build than torch's breaks transformers: "
            "find out which requirement brings it (pip install --dry-run) and leave that out"
        )
    return found


def resolve(python: Path, constraints: dict[str, str], requirements: list[str]) -> dict[str, str]:
    """What pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as directory:
        limits, report = Path(directory) / "limits.txt", Path(directory) / "report.json"
        limits.write_text(lines(constraints), encoding="utf-8")
        command = [python, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
        command += ["--report", report, "-c", limits, *requirements]
        subprocess.run([str(word) for word in command], cwd=ROOT, check=True)
        return resolved(json.loads(report.read_text(encoding="utf-8")))


def lines(versions: dict[str, str]) -> str:
    """The body of a constraints file."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


def main() -> int:
    """Resolve both environments, write both files, and say what changed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    minimum = project["requires-python"].removeprefix(">=")
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if running != minimum:
        print(
            f"make_constraints: resolve with Python {minimum}, the oldest supported one, not {running}, "
            f"so that every pin exists there: make constraints PYTHON=python{minimum}",
            file=sys.stderr,
        )
        return 1
    path = ROOT / "constraints.txt"
    before = path.read_text(encoding="utf-8")
    head = before.partition(MARK)[0]
    by_hand = pins(head)
    with tempfile.TemporaryDirectory() as directory:
        venv.create(directory, with_pip=True)
        python = Path(directory) / "bin" / "python"
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-U", "pip"], check=True)
        newest = resolve(python, by_hand, [f".[{','.join(EXTRAS)}]", *TOOLS])
        low = lowest(project)
        same = {name: newest[name] for name in (*TOOLS, *RUNNERS)}
        extras = ",".join(extra for extra in EXTRAS if extra != "docs")
        oldest = resolve(python, low | same | {"torch": by_hand["torch"]}, [f".[{extras}]", *TOOLS])
    written = {name: version for name, version in newest.items() if name not in by_hand}
    path.write_text(head + MARK + lines(written), encoding="utf-8")
    alone = {name: version for name, version in by_hand.items() if name in BY_HAND}
    (ROOT / "constraints-oldest.txt").write_text(OLDEST + lines(oldest | alone), encoding="utf-8")
    earlier = pins(before)
    for name in sorted({*earlier} | {*by_hand} | {*written}):
        now = (by_hand | written).get(name)
        if earlier.get(name) != now:
            print(f"{name}: {earlier.get(name, 'not pinned')} -> {now or 'no longer needed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
