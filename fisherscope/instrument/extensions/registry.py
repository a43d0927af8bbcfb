"""The one place where extensions are registered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fisherscope.errors import UsageError
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
    found: dict[str, Extension] = {}
    for item in _listed(chosen):
        if isinstance(item, str):
            if item not in _extensions:
                raise UsageError(f"no extension {item!r}: there are {sorted(_extensions)}")
            extension: Extension = _extensions[item]()
        elif isinstance(item, type) and issubclass(item, Extension):
            extension = _made(item)
        elif isinstance(item, Extension):
            extension = item
        else:
            raise UsageError(
                f"{item!r} is no extension: give a name, one of {sorted(_extensions)}, or an object such as "
                "fisherscope.Fisher()"
            )
        if extension.name in found:
            raise UsageError(f"extension {extension.name!r} is given twice")
        found[extension.name] = extension
    return tuple(found.values())


def _listed(chosen: Any) -> Iterable[Any]:
    """The choice as a list, of one where it is no list."""
    if isinstance(chosen, str | Extension | type):
        return (chosen,)
    if isinstance(chosen, Iterable):
        return chosen
    message = f"extensions={chosen!r}: give a list of names or objects; () collects group values alone"
    raise UsageError(message)  # as for every other option


def _made(kind: type[Extension]) -> Extension:
    """The extension with its default options, where the class stands for it."""
    try:
        return kind()
    except TypeError as error:
        raise UsageError(
            f"extensions: {kind.__name__} is a class and needs options ({error}): pass an object"
        ) from error
