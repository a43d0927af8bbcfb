"""The check that follows every install finds wrong versions and a torchvision that slipped in."""

import importlib.util
import re
import sys
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "check_install.py"
PIN = "# comment\ntorch==2.13.0\nbackpack-for-pytorch==1.7.1\neinops==0.8.2\nunfoldNd==0.2.3\n"
BACKPACK = {"backpack-for-pytorch": "1.7.1", "einops": "0.8.2", "unfoldNd": "0.2.3"}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_install", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(**packages):
    def installed(name):
        if name not in packages:
            raise PackageNotFoundError(name)
        return packages[name]

    return installed


@pytest.mark.parametrize("torch", ["2.13.0", "2.13.0+cpu", "2.13.0+cu130"])
def test_right_installations(script, torch):
    """The pinned version passes, whatever its build is called."""
    assert script.faults(PIN, environment(torch=torch, **BACKPACK)) == []


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        ({"torch": "2.15.0"}, r"torch is 2\.15\.0, constraints\.txt pins 2\.13\.0"),
        ({"torch": "2.13.01"}, "pins"),
        ({}, "torch is not installed"),
        ({"torch": "2.13.0", "torchvision": "0.28.0"}, r"torchvision 0\.28\.0 is installed"),
    ],
)
def test_wrong_installations(script, packages, message):
    """Each fault is named together with what to do about it."""
    (fault,) = script.faults(PIN, environment(**(BACKPACK | packages)))
    assert re.search(message, fault)
    assert "pip install -c constraints.txt" in fault


@pytest.mark.parametrize("version", [None, "1.6.0"])
def test_backpack_is_installed_without_its_dependencies(script, version):
    """A missing or wrong BackPACK is a fault, and the remedy is the install that leaves torchvision out."""
    packages = {"torch": "2.13.0"} | BACKPACK | {"backpack-for-pytorch": version}
    installed = {name: found for name, found in packages.items() if found}
    (fault,) = script.faults(PIN, environment(**installed))
    assert fault.startswith("backpack-for-pytorch is ")
    assert "--no-deps backpack-for-pytorch einops unfoldNd" in fault


@pytest.mark.parametrize("newest", [False, True])
def test_every_pin_is_checked(script, newest):
    """Another version is a fault, a missing package is none; of the newest, torch alone is pinned."""
    pins = PIN + "numpy==2.4.6\nmypy==2.4.1\npip==26.3\n"
    installed = environment(torch="2.13.0", numpy="2.5.0", pip="20.0", **BACKPACK)
    found = script.faults(pins, installed, newest=newest)
    assert [line.partition(":")[0] for line in found] == (
        [] if newest else ["numpy is 2.5.0, constraints.txt pins 2.4.6"]
    )


def test_this_environment(script):
    """The environment that runs the tests is what `make` was asked for, by the committed constraints."""
    mark = Path(sys.prefix) / ".made-by-fisherscope"
    if not mark.exists():
        pytest.skip("this environment was not made by make; scripts/check_install.py checks it")
    kind = mark.read_text(encoding="utf-8").strip()
    constraints = script.FILES[kind].read_text(encoding="utf-8")
    assert script.faults(constraints, version, newest=kind == "newest") == []


@pytest.mark.parametrize("kind", ["pinned", "oldest"])
def test_every_kind_can_be_checked(script, kind):
    """What each file pins is found in it, however the names are written."""
    constraints = script.FILES[kind].read_text(encoding="utf-8")

    def as_pinned(name):
        if name == "torchvision":
            raise PackageNotFoundError(name)
        return script.pinned(constraints, name.upper().replace("-", "_"))

    assert script.faults(constraints, as_pinned) == []


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_the_constraints_are_complete(script, name):
    """Whatever an install of the package with its extras brings, transitively, is pinned to one version."""
    oldest = name != "constraints.txt"
    pinned = {
        canonicalize_name(found) for found in script.all_pinned((ROOT / name).read_text(encoding="utf-8"))
    }
    assert "torchvision" not in pinned
    assert {"pip", "hatchling", "editables", "pytest"} <= pinned
    mark = Path(sys.prefix) / ".made-by-fisherscope"
    kind = mark.read_text(encoding="utf-8").strip() if mark.exists() else "pinned"
    if kind != ("oldest" if oldest else "pinned"):
        pytest.skip(f"what {name} leads to is not what is installed here")
    extras = ("dev", "peft", "datasets") if oldest else ("dev", "docs", "peft", "datasets")
    brought = closure("fisherscope", frozenset(extras))
    assert len(brought) > 60
    assert brought - pinned == set()


def closure(package, extras):
    """Canonical names of what a package requires, and what that requires, where it is installed.

    Without what CUDA builds of torch bring: torch itself pins that.
    """
    installed = {canonicalize_name(one.metadata["Name"]) for one in distributions()}
    found, todo = set(), [(package, extras)]
    while todo:
        name, wanted = todo.pop()
        for requirement in map(Requirement, requires(name) or []):
            marker, brought = requirement.marker, canonicalize_name(requirement.name)
            applies = marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted or {""})
            if not applies or brought not in installed or brought.startswith(("nvidia", "cuda", "triton")):
                continue
            if brought not in found:
                todo.append((brought, frozenset(requirement.extras)))
            found.add(brought)
    return found - {package}


def test_an_unpinned_torch_is_refused(script):
    """Constraints that lost their pin are an error, not a check that passes."""
    with pytest.raises(ValueError, match="do not pin torch"):
        script.faults("torch>=2.6\n", environment(torch="2.13.0"))
