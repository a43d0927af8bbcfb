"""Check an installation: what constraints.txt pins has that version, and torchvision stayed out.

Exit status 1 and one line per fault otherwise. Imports nothing but the standard library.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

WITHOUT_DEPENDENCIES = ("backpack-for-pytorch", "einops", "unfoldNd")
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"


def pinned(text: str, package: str) -> str:
    """The version that a constraints file pins for a package.

    Raises:
        ValueError: the package is not pinned with ``==``.
    """
    match = re.search(rf"^{re.escape(package)}==([\w.]+)\s*(?:#.*)?$", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"constraints.txt does not pin {package} with ==")
    return match.group(1)


def faults(constraints: str, installed: Callable[[str], str]) -> list[str]:
    """What is wrong with the installation, one line each.

    Args:
        constraints: text of the constraints file.
        installed: version of an installed package; raises ``PackageNotFoundError`` where there is none.
    """

    def find(name: str) -> str | None:
        try:
            return installed(name)
        except PackageNotFoundError:
            return None

    def differs(package: str, remedy: str) -> list[str]:
        wanted, version = pinned(constraints, package), find(package)
        if version is None:
            return [f"{package} is not installed, constraints.txt pins {wanted}: {remedy}"]
        # a local suffix such as +cpu names the build, not the version
        if version.partition("+")[0] != wanted:
            return [f"{package} is {version}, constraints.txt pins {wanted}: {remedy}"]
        return []

    without = f"`pip install -c constraints.txt --no-deps {' '.join(WITHOUT_DEPENDENCIES)}`"
    again = "make an environment anew (make clean-env) and install with `pip install -c constraints.txt`"
    found = differs("torch", again)
    for package in WITHOUT_DEPENDENCIES:
        found += differs(package, without)
    torchvision = find("torchvision")
    if torchvision is not None:
        found.append(
            f"torchvision {torchvision} is installed: beside another build of torch it breaks transformers, "
            f"and nothing here needs it; see who required it with `pip show torchvision`, then {again}"
        )
    return found


def main() -> int:
    """Print the faults of this environment; 0 when there are none."""
    found = faults(CONSTRAINTS.read_text(encoding="utf-8"), version)
    for line in found:
        print(f"check_install: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
