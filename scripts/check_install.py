"""Check an installation: what is pinned has that version, and torchvision stayed out.

``check_install.py [pinned | oldest | newest]``: by constraints.txt, constraints-oldest.txt, or torch alone.
Exit status 1 and one line per fault otherwise. Imports nothing but the standard library.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

WITHOUT_DEPENDENCIES = ("backpack-for-pytorch", "einops", "unfoldNd")
ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
FILES = {"pinned": CONSTRAINTS, "oldest": ROOT / "constraints-oldest.txt", "newest": CONSTRAINTS}
# Installs the others, and is imported by none.
UNCHECKED = ("pip",)


def pinned(text: str, package: str) -> str:
    """The version that a constraints file pins for a package.

    Raises:
        ValueError: the package is not pinned with ``==``.
    """
    for name, found in re.findall(r"^([\w.-]+)==([\w.!]+)\s*(?:#.*)?$", text, re.MULTILINE):
        if canonical(name) == canonical(package):
            return str(found)
    raise ValueError(f"the constraints do not pin {package} with ==")


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def all_pinned(text: str) -> list[str]:
    """Names of the packages that a constraints file pins with ``==``, in its order."""
    return re.findall(r"^([\w.-]+)==", text, re.MULTILINE)


def faults(
    constraints: str,
    installed: Callable[[str], str],
    *,
    newest: bool = False,
    file: str = "constraints.txt",
) -> list[str]:
    """What is wrong with the installation, one line each.

    A pinned package that is not installed is a fault for torch and BackPACK alone: extras may be left out.

    Args:
        constraints: text of the constraints file.
        installed: version of an installed package; raises ``PackageNotFoundError`` where there is none.
        newest: only torch must have the version that is pinned.
        file: name of the constraints file.
    """

    def find(name: str) -> str | None:
        try:
            return installed(name)
        except PackageNotFoundError:
            return None

    def differs(package: str, remedy: str) -> list[str]:
        wanted, version = pinned(constraints, package), find(package)
        if version is None:
            return [f"{package} is not installed, {file} pins {wanted}: {remedy}"]
        # a local suffix such as +cpu names the build, not the version
        if version.partition("+")[0] != wanted:
            return [f"{package} is {version}, {file} pins {wanted}: {remedy}"]
        return []

    without = f"`pip install -c {file} --no-deps {' '.join(WITHOUT_DEPENDENCIES)}`"
    again = f"make an environment anew (make clean-env) and install with `pip install -c {file}`"
    found = differs("torch", again)
    for package in () if newest else WITHOUT_DEPENDENCIES:
        found += differs(package, without)
    apart = {canonical(name) for name in ("torch", *WITHOUT_DEPENDENCIES, *UNCHECKED)}
    others = {name for name in all_pinned(constraints) if canonical(name) not in apart}
    for package in () if newest else sorted(others):
        if find(package) is not None:
            found += differs(package, again)
    torchvision = find("torchvision")
    if torchvision is not None:
        found.append(
            f"torchvision {torchvision} is installed: beside another build of torch it breaks transformers, "
            f"and nothing here needs it; see who required it with `pip show torchvision`, then {again}"
        )
    return found


def main() -> int:
    """Print the faults of this environment; 0 when there are none."""
    kind = sys.argv[1] if len(sys.argv) > 1 else "pinned"
    if kind not in FILES:
        print(
            f"check_install: {kind!r} is no kind of environment, choose {', '.join(FILES)}", file=sys.stderr
        )
        return 1
    path = FILES[kind]
    found = faults(path.read_text(encoding="utf-8"), version, newest=kind == "newest", file=path.name)
    for line in found:
        print(f"check_install: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
