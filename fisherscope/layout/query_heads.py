"""Tables of head slices, seen from the query heads."""

from __future__ import annotations

import pandas as pd

from fisherscope.layout.attention import KEY_VALUE_BLOCKS, role_of
from fisherscope.layout.model import ModelLayout

NOTE = "K and V repeat the value of the kv head that each query head uses: they are no further measurements"


def per_query_head(layout: ModelLayout, frame: pd.DataFrame) -> pd.DataFrame:
    """Repeat the rows of K and V for every query head that uses them: query head h uses ``h // (H / H_kv)``.

    Args:
        layout: of the model that the table is of.
        frame: columns ``stack``, ``layer``, ``block``, and ``head`` (or ``index`` beside ``kind``), as in the
            tables of results; rows of other kinds than "head" are left out.

    Returns:
        The rows with two more columns: ``query_head``, and ``shared``, the number of query heads that one
        measurement stands for (1 for Q and O). ``attrs["note"]`` says so in words.

    Raises:
        KeyError: the table lacks a column, or the model a layer of the table.
    """
    rows = frame[frame["kind"] == "head"] if "kind" in frame else frame
    head = "head" if "head" in frame else "index"
    users: list[list[int]] = []
    for stack, layer, block, number in rows[["stack", "layer", "block", head]].itertuples(index=False):
        attention = layout.attention_layer(int(layer), str(stack) or None)
        grouped = role_of(block) in KEY_VALUE_BLOCKS
        mine = attention.query_heads(int(number)) if grouped else range(number, number + 1)
        users.append(list(mine))
    repeated = rows.assign(query_head=pd.Series(users, index=rows.index, dtype=object))
    repeated["shared"] = [len(mine) for mine in users]
    repeated = repeated.explode("query_head", ignore_index=True).astype({"query_head": "int64"})
    repeated.attrs["note"] = NOTE
    return repeated
