"""show_versions says what a bug report needs, and nothing about the machine's paths."""

from pathlib import Path

import fisherscope
from fisherscope.versions import show_versions


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
