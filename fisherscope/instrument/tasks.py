"""From the ``tasks`` argument to samples."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fisherscope.errors import DataError
from fisherscope.instrument.data import Sample, prepare_task, read_jsonl
from fisherscope.instrument.model_facts import ModelFacts
from fisherscope.instrument.objectives import Objective
from fisherscope.instrument.options import CollectOptions

Tasks = Mapping[str, Iterable[Any] | str | Path]

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def prepare_tasks(
    tasks: Tasks, facts: ModelFacts, options: CollectOptions, objective: Objective
) -> dict[str, list[Sample]]:
    """Every sample of every task, checked before anything is written.

    Raises:
        DataError: a task or a row cannot be used.
    """
    if not isinstance(tasks, Mapping) or not tasks:
        raise DataError('no tasks: pass a mapping from name to rows, such as {"math": rows}')
    config: Any = facts.model.config
    prepared = {}
    for name, rows in tasks.items():
        if not isinstance(name, str) or not _TASK_NAME.fullmatch(name):
            raise DataError(
                f"{name!r} is not a task name: use letters, digits, '_', '.' and '-', at most 64 of them"
            )
        prepared[name] = prepare_task(
            name,
            read_jsonl(rows) if isinstance(rows, str | Path) else rows,
            facts.tokenizer,
            encode=objective.encode,
            labelling=objective.labelling,
            config=config,
            seed=options.seed,
            max_length=options.max_length,
            max_samples=options.max_samples,
            vocab_size=facts.vocabulary,
            classes=config.num_labels if objective.label_range == "classes" else None,
            max_positions=facts.max_positions(),
        )
        if len(prepared[name]) == 1:
            warnings.warn(
                f"task {name!r} has a single sample: its variance, intervals and tests are undefined",
                stacklevel=5,
            )
    return prepared
