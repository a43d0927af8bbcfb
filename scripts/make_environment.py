"""Make a virtual environment with this project in it.

``make_environment.py DIRECTORY [pinned | oldest | newest]``: what constraints.txt says,
what constraints-oldest.txt says, or the newest release of everything but torch, also beyond the bounds in
pyproject.toml. Needs nothing but Python. The directory is made anew, so that nothing of an earlier
environment stays; one that this script did not make is left alone.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Written first, so that a directory is known as made here although its installation was interrupted.
MARK = ".made-by-fisherscope"
CONSTRAINTS = {"pinned": "constraints.txt", "oldest": "constraints-oldest.txt"}
WITHOUT_DEPENDENCIES = ("backpack-for-pytorch", "einops", "unfoldNd")
TOOLS = ("pip", "hatchling", "editables")
EXTRAS = ("dev", "docs", "peft", "datasets")
GIGABYTES = 3.0  # 2.1 installed, and what pip unpacks meanwhile; a CUDA build of torch takes 5 more
GIGABYTE = 1e9


class InstallError(Exception):
    """The environment could not be made; the message says why and what to do."""


def free_gigabytes(path: Path) -> float:
    """Free space where a directory is, or will be, in 10^9 bytes."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / GIGABYTE


def check_directory(path: Path) -> None:
    """Refuse a directory that holds something else, or a disk that is too small.

    Raises:
        InstallError: it is not an environment that was made here, or less than 3 GB are free.
    """
    ours = (path / MARK).exists() or (path / ".installed").exists()
    if path.exists() and not ours and any(path.iterdir()):
        raise InstallError(
            f"{path} is there and was not made by make, which would delete what is in it: "
            f"move it away, or choose another directory (make VENV=other-directory)"
        )
    size = sum(f.lstat().st_size for f in path.rglob("*") if f.is_file()) / GIGABYTE if path.exists() else 0.0
    free = free_gigabytes(path.absolute()) + size
    if free < GIGABYTES:
        raise InstallError(
            f"the disk of {path} has {free:.1f} GB free and an environment takes {GIGABYTES:.0f}: free some, "
            f"or put the environment on another disk (make VENV=/other/disk/venv)"
        )


def make_empty(path: Path) -> Path:
    """A new virtual environment in place of an earlier one; returns its interpreter.

    Raises:
        InstallError: this Python cannot make virtual environments.
    """
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    (path / MARK).touch()
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(path)], capture_output=True, text=True, check=False
    )
    python = path / "bin" / "python"
    if made.returncode or not python.exists():
        raise InstallError(
            f"{sys.executable} cannot make virtual environments: {(made.stderr or made.stdout).strip()}\n"
            "on Debian and Ubuntu: apt-get install python3-venv; or name another interpreter: "
            "make PYTHON=/path/to/python3.12"
        )
    return python


def unbounded(pyproject: str) -> list[str]:
    """The requirements of the package and of its extras, without upper bounds.

    Args:
        pyproject: text of pyproject.toml.
    """
    import tomllib

    project = tomllib.loads(pyproject)["project"]
    every = list(project["dependencies"])
    for extra in EXTRAS:
        every += project["optional-dependencies"][extra]
    return sorted({re.sub(r",?<=?[\w.]+", "", requirement) for requirement in every})


def commands(kind: str, constraints: str, pyproject: str) -> list[list[str]]:
    """Arguments of pip, call by call, that fill an empty environment.

    The package is built with the tools in the environment, so that those are pinned, too.

    Args:
        kind: ``pinned``, ``oldest`` or ``newest``.
        constraints: text of constraints.txt, from which ``newest`` takes torch alone.
        pyproject: text of pyproject.toml.
    """
    if kind == "newest":
        torch = re.search(r"^torch==[\w.]+", constraints, re.MULTILINE)
        if torch is None:
            raise InstallError("constraints.txt does not pin torch with ==: add the line torch==<version>")
        return [
            ["-U", *TOOLS],
            [torch[0], *(r for r in unbounded(pyproject) if not r.startswith("torch>"))],
            ["--no-build-isolation", "--no-deps", "-e", "."],
            ["--no-deps", *WITHOUT_DEPENDENCIES],
        ]
    limits = ["-c", CONSTRAINTS[kind]]
    # linters, types and documentation belong to the pinned environment
    extras = EXTRAS if kind == "pinned" else tuple(extra for extra in EXTRAS if extra != "docs")
    return [
        [*limits, *TOOLS],
        [*limits, "--no-build-isolation", "-e", f".[{','.join(extras)}]"],
        [*limits, "--no-deps", *WITHOUT_DEPENDENCIES],
    ]


def install(python: Path, arguments: list[str], path: Path) -> None:
    """One call of pip.

    Raises:
        InstallError: pip did; what it said stands before.
    """
    command = [str(python), "-m", "pip", "install", "-qq", "--no-input", *arguments]
    if subprocess.run(command, cwd=ROOT, check=False).returncode == 0:
        return
    if free_gigabytes(path) < 0.5:
        raise InstallError(f"the disk of {path} is full: free some space and run the same command again")
    raise InstallError(
        "pip could not install, and says why above. An index of packages must be within reach the first "
        "time: where there is no network, or another index, set PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or "
        "PIP_FIND_LINKS, and run the same command again"
    )


def make(path: Path, kind: str) -> None:
    """Make the environment and check it."""
    check_directory(path)
    began = time.monotonic()
    print(
        f"installing into {path} ({kind}): 1 to 5 minutes and 2 GB, "
        "or 7 GB where the index gives a CUDA build of torch",
        flush=True,
    )
    python = make_empty(path)
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for arguments in commands(kind, constraints, pyproject):
        install(python, arguments, path)
    (path / MARK).write_text(f"{kind}\n", encoding="utf-8")
    check = [str(python), str(ROOT / "scripts" / "check_install.py"), kind]
    if subprocess.run(check, check=False).returncode:
        raise InstallError("the environment is not what was asked for, as said above")
    (path / ".installed").touch()
    print(f"installed in {time.monotonic() - began:.0f} s")


def main() -> int:
    """Exit status 1 and one message where the environment cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("kind", nargs="?", choices=("pinned", "oldest", "newest"), default="pinned")
    chosen = parser.parse_args()
    try:
        make(chosen.directory, chosen.kind)
    except InstallError as error:
        print(f"fisherscope: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
