"""The one place where extensions are registered."""

from __future__ import annotations

from collections.abc import Sequence

from fisherscope.instrument.extensions.base import Extension
from fisherscope.plugins import Plugins

_plugins = Plugins(
    "fisherscope.extensions",
    "fisherscope.instrument.extensions.exact_per_token",
    "fisherscope.instrument.extensions.fisher",
    "fisherscope.instrument.extensions.kronecker",
    "fisherscope.instrument.extensions.positions",
    "fisherscope.instrument.extensions.sample_gradients",
)

_extensions: dict[str, type[Extension]] = {}


def register_extension(extension: type[Extension]) -> type[Extension]:
    """Decorator: the extension can be asked for by its ``name``, with its default options."""
    _extensions[extension.name] = extension
    return extension


def resolve_extensions(chosen: Sequence[str | Extension]) -> tuple[Extension, ...]:
    """Names and objects to objects, each quantity once.

    Raises:
        ValueError: an unknown name, or one quantity twice.
    """
    _plugins.load()
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
