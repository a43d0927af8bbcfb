"""Modules that register something when they are imported: built-in ones, and those of other packages."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.metadata import entry_points


class Plugins:
    """Loads modules and entry points once, at first use, so that importing the package stays quick.

    Attributes:
        have_built_in: whether the built-in modules are loaded.
    """

    def __init__(self, group: str, *built_in: str) -> None:
        """Nothing is imported yet.

        Args:
            group: name of the entry points of other packages.
            built_in: modules of our own.
        """
        self._group = group
        self._built_in = built_in
        self._begun = False
        self.have_built_in = False

    def load(self) -> None:
        """Import the built-in modules, then what other packages offer. A second call does nothing.

        What cannot be loaded is named in a warning, and the rest is there.
        """
        if self._begun:
            return
        self._begun = True
        for module in self._built_in:
            import_module(module)
        self.have_built_in = True
        for entry in entry_points(group=self._group):
            try:
                entry.load()
            except Exception as error:  # a package of somebody else fails as it likes
                what = f"{entry.name!r} of {entry.value!r} ({self._group})"
                warnings.warn(f"cannot load {what}: {error}", stacklevel=3)
