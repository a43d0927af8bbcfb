"""The check that follows every install finds wrong versions and a torchvision that slipped in."""

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "check_install.py"
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


def test_this_environment(script):
    """The environment that runs the tests is itself a right one, by the committed constraints."""
    assert script.faults(script.CONSTRAINTS.read_text(encoding="utf-8"), version) == []


def test_an_unpinned_torch_is_refused(script):
    """Constraints that lost their pin are an error, not a check that passes."""
    with pytest.raises(ValueError, match="does not pin torch"):
        script.faults("torch>=2.6\n", environment(torch="2.13.0"))
