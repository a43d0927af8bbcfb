"""From the ``tasks`` argument to samples."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from fisherscope.errors import DataError
from fisherscope.instrument.data import Sample, prepare_task, read_task_file, refuse_unread
from fisherscope.instrument.fitting import refuse_misread_padding, refuse_wrong_images
from fisherscope.instrument.model_facts import ModelFacts
from fisherscope.instrument.objectives import Objective
from fisherscope.instrument.objectives.arguments import (
    reachable_arguments,
    settle_arguments,
    takes,
    zeros_are_as_none,
)
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
    settle_arguments(facts.model)
    check = refuse_unread(reachable_arguments(facts.model), has_decoder=objective.labelling == "decoder")
    prepared = {}
    for name, rows in tasks.items():
        _check_name(name)
        prepared[name] = prepare_task(
            name,
            read_task_file(rows) if isinstance(rows, str | Path) else rows,
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
            # an objective of the user's own may have a use for them
            token_types=not objective.is_named or takes(facts.model, "token_type_ids"),
            check=check,
        )
        _refuse_mixed_types(name, prepared[name], facts.model)
        refuse_wrong_images(name, prepared[name], facts.model)
        if len(prepared[name]) == 1:
            warnings.warn(
                f"task {name!r} has a single sample: its variance, intervals and tests are undefined",
                stacklevel=5,
            )
    if objective.name == "sequence_classification" and options.batch_size != 1:
        refuse_misread_padding(prepared, facts.model, facts.pad_id())
    return prepared


def _refuse_mixed_types(name: str, samples: list[Sample], model: nn.Module) -> None:
    """Rows with token types beside rows without: a batch has zeros for these, which must change nothing."""
    without = [row for row, sample in enumerate(samples) if sample.token_types is None]
    if without and len(without) < len(samples) and not zeros_are_as_none(model, "token_type_ids"):
        raise DataError(
            f"sample {name}_{without[0]} has no token_type_ids, and other rows of the task have some: to "
            f"{type(model).__name__} zeros are not the same as none; give them for every row, or for none"
        )


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not _TASK_NAME.fullmatch(name):
        raise DataError(
            f"{name!r} is not a task name: use letters, digits, '_', '.' and '-', at most 64 of them"
        )
    # the tables of a report are CSV files, in which a name has no type
    read = pd.read_csv(io.StringIO(f"task\n{name}\n"))["task"][0]
    if pd.isna(read) or str(read) != name:
        raise DataError(
            f"{name!r} cannot be the name of a task: pandas.read_csv reads it as {read} from the tables of a "
            f"report; choose another, such as 'task_{name}'"
        )
