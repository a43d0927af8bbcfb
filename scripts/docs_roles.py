"""Griffe extension: cross-reference roles of docstrings, such as :class:`~a.b.C`, become plain code (`C`).

Editors and ``help()`` read the docstrings as they are; the documentation is Markdown.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object
from typing_extensions import override

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|exc|data):`(~?)([^`]+)`")


def plain(text: str) -> str:
    """The text without roles: a leading ``~`` keeps the last part of a dotted name only."""
    return _ROLE.sub(lambda m: f"`{m[2].rpartition('.')[2] if m[1] else m[2]}`", text)


class PlainRoles(Extension):
    """Rewrites every docstring as it is read."""

    @override
    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
