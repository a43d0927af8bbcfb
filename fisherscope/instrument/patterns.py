"""Names of parameters by shell-style patterns, and what may have been meant where none matches."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def matching(names: Iterable[str], patterns: Iterable[str]) -> tuple[str, ...]:
    """The names that match one of the patterns, in their order."""
    patterns = tuple(patterns)
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def suggestion(names: Sequence[str], patterns: Iterable[str]) -> str:
    """A sentence with a pattern that matches, close to one that does not; nothing where there is none."""
    for pattern in patterns:
        for wider in (f"*{pattern}", f"{pattern}*", f"*{pattern}*"):
            if found := matching(names, [wider]):
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                return f"Did you mean {wider!r} ({found[0]}{more})? "
        if close := difflib.get_close_matches(pattern, names, 1):
            return f"Did you mean {close[0]!r}? "
    return ""
