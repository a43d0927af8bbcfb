"""What an object is, told by the path of its class: no optional library is imported to ask."""

from __future__ import annotations


def is_a(thing: object, package: str, name: str) -> bool:
    """Whether one of the object's classes has this name and lives in this package.

    Args:
        thing: any object.
        package: where the class is defined, or any package above that.
        name: of the class.
    """
    return any(
        kind.__name__ == name and f"{kind.__module__}.".startswith(f"{package}.")
        for kind in type(thing).__mro__
    )
