"""Names of datasets: any parameter name as a path that is safe in HDF5, in JSON and on a terminal."""

from __future__ import annotations

import re

MAX_NAME = 1024
_PLAIN = re.compile(r"[A-Za-z0-9_.]")
_ENCODED = re.compile(r"(?:-[0-9a-f]{2})+|[A-Za-z0-9_.]+")
_COMPONENT = re.compile(r"-|(?:[A-Za-z0-9_.]|-[0-9a-f]{2})+")


def escape_path(path: str) -> str:
    """Write a path with ``[A-Za-z0-9_.]``, ``/`` and ``-`` only.

    Every other character becomes ``-hh`` per byte of its UTF-8 form, and so does a dot that would make a
    component ``.`` or put two dots side by side. An empty component is ``-``. Different paths stay different.
    """
    return "/".join(_escape(component) for component in path.split("/"))


def _escape(component: str) -> str:
    out: list[str] = []
    for index, char in enumerate(component):
        special_dot = char == "." and (component == "." or (index > 0 and component[index - 1] == "."))
        if _PLAIN.fullmatch(char) and not special_dot:
            out.append(char)
        else:
            out.extend(f"-{byte:02x}" for byte in char.encode())
    return "".join(out) or "-"


def unescape_path(path: str) -> str:
    """Inverse of :func:`escape_path`.

    Raises:
        ValueError: ``path`` is not an escaped path.
    """
    return "/".join(_unescape(component) for component in path.split("/"))


def _unescape(component: str) -> str:
    if component == "-":
        return ""
    if not _COMPONENT.fullmatch(component):
        raise ValueError(f"not an escaped name: {component!r}")
    return "".join(
        bytes.fromhex(run.replace("-", "")).decode() if run.startswith("-") else run
        for run in _ENCODED.findall(component)
    )


def is_dataset_name(name: str) -> bool:
    """Whether ``name`` can be a dataset's: relative, escaped, without ``..``, not too long."""
    if len(name) > MAX_NAME or ".." in name:
        return False
    return all(_COMPONENT.fullmatch(part) and part != "." for part in name.split("/"))
