"""The embedded demo: a small trained transformer with three tasks, shipped as package data.

The model is a Qwen2 with grouped-query attention (4 layers, 8 query heads, 2 key/value heads, width 128) and
a byte-level tokenizer, one token per ASCII character. It solves two tasks: ``math`` (two-digit addition) and
``code`` (look-ups in short straight-line programs). ``math_flipped`` has the prompts of ``math`` with every
digit d of the answer replaced by 9 - d: a conflict that is planted, so that an analysis can be seen to find
it. All samples are held out from training. ``examples/demo_model/train.py`` makes everything here.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, cast

__all__ = ["model_path", "planted_pairs", "task_files", "training_record"]

_ROOT = Path(__file__).resolve().parent
_TASKS = ("math", "code", "math_flipped")


def model_path() -> Path:
    """Returns the directory of the model and its tokenizer, as ``from_pretrained`` takes it."""
    return _ROOT / "model"


def task_files() -> dict[str, Path]:
    r"""Returns the sample files by task name, in the order ``math``, ``code``, ``math_flipped``.

    Each is JSON lines of ``{"prompt": ..., "completion": ...}``. Completions end as they did in training (a
    newline after a sum, a semicolon after a value), so that the model predicts every one of their tokens.
    """
    return {name: _ROOT / "data" / f"{name}.jsonl" for name in _TASKS}


def planted_pairs() -> list[tuple[str, str]]:
    """Returns the planted conflicts as sample ids, ``("math_7", "math_flipped_7")``.

    The two samples of a pair have one prompt and contradicting completions. An id is the task name and the
    0-based row in its file; the rows of ``math_flipped`` are shuffled, so the two numbers differ.
    """
    with (_ROOT / "data" / "planted_pairs.csv").open(newline="", encoding="utf-8") as handle:
        return [(row["math"], row["math_flipped"]) for row in csv.DictReader(handle)]


def training_record() -> dict[str, Any]:
    """Returns what was measured when the model was trained.

    The keys: ``seed``, ``steps``, ``held_out_accuracy`` (by task, share of whole answers that are right),
    ``planted_conflict`` (cosines between gradients of planted pairs and of other pairs), and ``tasks`` with,
    by task, ``mean_loss`` (nats per sample, summed over its tokens), ``largest_sample_share_of_fisher`` and
    ``median_fisher``.
    """
    text = (_ROOT / "model" / "training.json").read_text(encoding="utf-8")
    return cast("dict[str, Any]", json.loads(text))
