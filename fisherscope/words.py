"""Numbers with their nouns, for everything that is read by people."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and what is counted: ``1 sample``, ``1,234 samples``.

    Args:
        number: how many.
        noun: the name of one.
        plural: of several, where it is not the noun with an "s".
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def several(number: int, one: str, many: str) -> str:
    """The word that fits a number: ``several(n, "is", "are")``."""
    return one if number == 1 else many


def level(share: float) -> str:
    """A share that somebody chose, in full: ``50%``, ``99.5%``. Two different ones never read the same."""
    return f"{100 * share:.10g}%"
