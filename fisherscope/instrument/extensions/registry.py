"""The one place where extensions are registered."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points

from fisherscope.instrument.extensions.base import Extension

ENTRY_POINT_GROUP = "fisherscope.extensions"
_BUILT_IN = (
    "fisherscope.instrument.extensions.exact_per_token",
    "fisherscope.instrument.extensions.fisher",
    "fisherscope.instrument.extensions.kronecker",
    "fisherscope.instrument.extensions.positions",
    "fisherscope.instrument.extensions.sample_gradients",
)

_extensions: dict[str, type[Extension]] = {}
_loaded = False


def register_extension(extension: type[Extension]) -> type[Extension]:
    """Decorator: the extension can be asked for by its ``name``, with its default options."""
    _extensions[extension.name] = extension
    return extension


def resolve_extensions(chosen: Sequence[str | Extension]) -> tuple[Extension, ...]:
    """Names and objects to objects, each quantity once.

    Raises:
        ValueError: an unknown name, or one quantity twice.
    """
    _load()
    if isinstance(chosen, str):
        chosen = (chosen,)
    found: dict[str, Extension] = {}
    for item in chosen:
        if isinstance(item, str):
            if item not in _extensions:
                raise ValueError(f"no extension {item!r}: there are {sorted(_extensions)}")
            extension: Extension = _extensions[item]()
        else:
            extension = item
        if extension.name in found:
            raise ValueError(f"extension {extension.name!r} is given twice")
        found[extension.name] = extension
    return tuple(found.values())


def _load() -> None:
    global _loaded  # noqa: PLW0603 - a one-time latch
    if _loaded:
        return
    _loaded = True
    for module in _BUILT_IN:
        import_module(module)
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        entry.load()
