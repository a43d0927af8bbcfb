"""``--task NAME=FILE.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from fisherscope.instrument.options import BatchSize


def parse_tasks(values: Sequence[str]) -> dict[str, Path]:
    """Names and files of the tasks, in the order given.

    Raises:
        typer.BadParameter: not of the form NAME=FILE, or a name is given twice.
    """
    tasks: dict[str, Path] = {}
    for value in values:
        name, equals, file = value.partition("=")
        if not (name and equals and file):
            raise typer.BadParameter(
                f"{value!r} is not NAME=FILE.jsonl, as in --task math=data/math.jsonl", param_hint="--task"
            )
        if name in tasks:
            raise typer.BadParameter(
                f"two tasks are called {name!r} ({tasks[name]} and {file}); give each its own name",
                param_hint="--task",
            )
        tasks[name] = Path(file)
    return tasks


def parse_batch_size(value: str) -> BatchSize:
    """The word "auto" or a positive number of samples.

    Raises:
        typer.BadParameter: neither.
    """
    if value == "auto":
        return "auto"
    if value.isdecimal() and int(value) > 0:
        return int(value)
    raise typer.BadParameter(f"{value!r} is neither 'auto' nor a positive number", param_hint="--batch-size")


def check_ranks(rank: int, world_size: int, *, resume: bool) -> None:
    """Check which of how many processes this is.

    Raises:
        typer.BadParameter: there is no such one, or it may not join the others.
    """
    if rank >= world_size:
        raise typer.BadParameter(
            f"there is no rank {rank} among {world_size}: ranks are 0 to {world_size - 1}",
            param_hint="--rank",
        )
    if world_size > 1 and not resume:
        raise typer.BadParameter("several ranks join one store: name a new one", param_hint="--no-resume")


def parse_parameters(values: Sequence[str], words: Sequence[str], hint: str) -> str | tuple[str, ...]:
    """One of the words that stand for a choice, or patterns of parameter names.

    Raises:
        typer.BadParameter: a word among patterns.
    """
    if len(values) == 1 and values[0] in words:
        return values[0]
    if mixed := [value for value in values if value in words]:
        raise typer.BadParameter(f"{mixed[0]!r} cannot be combined with other values", param_hint=hint)
    return tuple(values)
