"""What samples of the demo's math and math_flipped have in common, besides being opposed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from fisherscope.demo import planted_pairs, task_files


def rows_of(n: int) -> dict[str, list[dict[str, Any]]]:
    """The first n planted pairs of the demo, twins in the same row, and the first n rows of code."""
    rows = {
        name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, path in task_files().items()
    }
    for name, ids in zip(("math", "math_flipped"), zip(*planted_pairs()[:n], strict=True), strict=True):
        rows[name] = [rows[name][int(one.rpartition("_")[2])] for one in ids]
    return {name: some[:n] for name, some in rows.items()}


def answer(row: dict[str, Any], *, flipped: bool) -> str:
    """The digits of an answer; of a flipped one those that it was flipped from."""
    digits = row["completion"].strip()
    return "".join(str(9 - int(digit)) for digit in digits) if flipped else digits


def in_place(a: str, b: str) -> int:
    """How many digits are the same at the same place, counted from the left as they are predicted."""
    return sum(x == y for x, y in zip(a, b, strict=False))


def shared(n: int) -> dict[str, Any]:
    """What pairs of math and math_flipped have in common: arrays ``[n, n]``, twins on the diagonal."""
    rows = rows_of(n)
    left = [answer(row, flipped=False) for row in rows["math"]]
    right = [answer(row, flipped=True) for row in rows["math_flipped"]]
    operands = [
        [set(row["prompt"].rstrip("=").split("+")) for row in rows[task]] for task in ("math", "math_flipped")
    ]

    def each(function: Callable[[int, int], Any]) -> Any:
        return np.array([[function(i, j) for j in range(n)] for i in range(n)])

    places = each(lambda i, j: in_place(left[i], right[j]))
    length = each(lambda i, j: len(left[i]) == len(right[j]))
    digits = np.array([len(one) for one in left])[:, None]
    return {
        "an operand": each(lambda i, j: bool(operands[0][i] & operands[1][j])),
        "the length of the answer": length,
        "a digit of the answer in place": places > 0,
        "all digits but one": length & (places == digits - 1),
        "the answer": length & (places == digits),
        "places": places,
    }
