"""Names that a reader is asked for: what exists, what was stored, what to collect again."""

from __future__ import annotations

import difflib

from fisherscope.errors import NotStoredError
from fisherscope.store.schema import StoreHeader


def known(header: StoreHeader, parameter: str) -> str:
    """Check that the model has a parameter.

    Raises:
        KeyError: it has not; the message names some that it has.
    """
    names = [info.name for info in header.layout.parameters]
    if parameter not in names:
        near = difflib.get_close_matches(parameter, names, 5, 0.4) or names[:5]
        raise KeyError(f"the model has no parameter {parameter!r}: it has {len(names)}, such as {near}")
    return parameter


def instrumented(header: StoreHeader, parameter: str) -> str:
    """Check that a parameter was instrumented.

    Raises:
        KeyError: the model has no such parameter.
        NotStoredError: it was not instrumented.
    """
    if known(header, parameter) not in header.parameters:
        raise NotStoredError(
            f"{parameter!r} was not instrumented: collect again with "
            f"wrap(..., parameters=[..., {parameter!r}])"
        )
    return parameter


def gradients_stored(header: StoreHeader, parameter: str) -> str:
    """Check that the gradients of a parameter are stored.

    Raises:
        KeyError: the model has no such parameter.
        NotStoredError: its gradients are not stored.
    """
    if known(header, parameter) not in header.gradient_parameters:
        raise NotStoredError(
            f"the store holds no per-sample gradients of {parameter!r}"
            + (", only their group values" if parameter in header.parameters else "")
            + ": collect again with extensions=(..., SampleGradients(parameters=[..., "
            f"{parameter!r}])) and another encoding than 'groups', or compute those of some samples again "
            "with scope.gradients(store, ids)"
        )
    return parameter
