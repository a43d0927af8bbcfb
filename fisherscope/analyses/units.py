"""What rankings and tables speak of: the stored groups, and sums of them by block, layer and model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy import sparse

from fisherscope.layout import BLOCKS, GroupTable, ModelLayout
from fisherscope.layout.attention import role_of as role_of  # noqa: PLC0414 - reports see analyses alone

COLUMNS = ["kind", "stack", "layer", "block", "index", "part", "parameter", "size"]

# Derived kinds: of which groups each is the sum, and what its rows are told apart by.
_DERIVED: tuple[tuple[str, tuple[str, ...], list[str]], ...] = (
    ("block", ("head", "channel"), ["stack", "layer", "block", "part"]),
    ("layer", ("parameter",), ["stack", "layer"]),
    ("model", ("parameter",), []),
)


@dataclass(frozen=True)
class Units:
    """Groups and sums of groups, in one fixed order.

    Attributes:
        frame: one row per unit: kind, stack, layer, block, index, part, parameter, size. Kinds beside
            those of the store are "block" (the head slices of one of Q, K, V, O, or the channels of an
            MLP), "layer" (all its parameters) and "model". Columns without meaning are empty or -1.
        groups: number of stored groups; they come first.
    """

    frame: pd.DataFrame
    groups: int
    _sums: sparse.csc_array

    @classmethod
    def build(cls, groups: pd.DataFrame) -> Units:
        """Units over a table of groups (columns as in :class:`~fisherscope.layout.GroupTable`)."""
        base = groups[COLUMNS].reset_index(drop=True)
        rows: list[dict[str, Any]] = []
        members: list[NDArray[np.int64]] = []
        for kind, sources, keys in _DERIVED:
            chosen = base[base["kind"].isin(sources)]
            if kind == "layer":
                chosen = chosen[chosen["layer"] >= 0]
            parts = chosen.groupby(keys, sort=False) if keys else [((), chosen)] if len(chosen) else []
            for key, part in parts:
                members.append(part.index.to_numpy())
                rows.append(_derived_row(kind, dict(zip(keys, key, strict=True)), int(part["size"].sum())))
        index = np.concatenate(members) if members else np.zeros(0, np.int64)
        ends = np.cumsum([0, *map(len, members)])
        sums = sparse.csc_array((np.ones(len(index)), index, ends), shape=(len(base), len(members)))
        frame = pd.concat([base, pd.DataFrame(rows, columns=COLUMNS)], ignore_index=True) if rows else base
        return cls(frame, len(base), sums)

    @classmethod
    def of_layout(cls, layout: ModelLayout, parameters: tuple[str, ...]) -> Units:
        """Units of a store's layout and instrumented parameters."""
        return cls.build(GroupTable.build(layout, parameters).frame())

    def __len__(self) -> int:
        return len(self.frame)

    def expand(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums per group ``[..., groups]`` to sums per unit ``[..., units]``."""
        derived = np.asarray(values.reshape(-1, self.groups) @ self._sums)
        return np.concatenate([values, derived.reshape(*values.shape[:-1], -1)], axis=-1)

    @cached_property
    def sizes(self) -> NDArray[np.float64]:
        """Entries per unit ``[units]``."""
        return self.frame["size"].to_numpy(np.float64)

    def of_kind(self, *kinds: str) -> NDArray[np.int64]:
        """Positions of the units of these kinds."""
        return np.flatnonzero(self.frame["kind"].isin(kinds).to_numpy())


def _derived_row(kind: str, key: dict[str, Any], size: int) -> dict[str, Any]:
    empty = {"stack": "", "layer": -1, "block": "", "index": -1, "part": "", "parameter": ""}
    return {"kind": kind, **empty, **key, "size": size}


def head_maps(frame: pd.DataFrame, columns: list[str], keys: dict[str, Sequence[str]]) -> xr.Dataset:
    """Labelled arrays out of a long table of head slices, for heat maps.

    Args:
        frame: columns stack, layer, block, head, the ``keys``, and the values; each combination once.
        columns: the values.
        keys: leading axes with their labels in order (``{"task": tasks}``, say).

    Returns:
        Variables with axes ``(*keys, [stack,] layer, block, head)``; the stack is an axis only where there
        are several, else a plain coordinate. NaN where a block has fewer heads than the widest.
    """
    axes = [*keys, "stack", "layer", "block", "head"]
    labels = {axis: list(dict.fromkeys(frame[axis].tolist())) for axis in axes}
    labels |= {key: list(wanted) for key, wanted in keys.items()}
    labels["layer"].sort()
    labels["head"].sort()
    labels["block"].sort(key=[*BLOCKS, *labels["block"]].index)
    index = pd.MultiIndex.from_product([labels[axis] for axis in axes], names=axes)
    full = frame.set_index(axes)[columns].reindex(index)
    shape = [len(labels[axis]) for axis in axes]
    variables = {name: (axes, full[name].to_numpy(np.float64).reshape(shape)) for name in columns}
    data = xr.Dataset(variables, coords={axis: labels[axis] for axis in axes})
    return data.squeeze("stack") if shape[axes.index("stack")] == 1 else data


def layer_label(row: Any) -> str:
    """Short name of a layer: ``L2`` (``encoder L2`` outside the decoder)."""
    stack = "" if row["stack"] in {"", "decoder"} else f"{row['stack']} "
    return f"{stack}L{row['layer']}"


def slice_name(row: Any, *, head: str = "head") -> str:
    """Short name of a head slice: ``L2 O head 5`` (``encoder L2 ...`` outside the decoder)."""
    return f"{layer_label(row)} {row['block']} head {row[head]}"


def layer_name(row: Any) -> str:
    """A layer in a sentence: ``layer 2``, ``encoder layer 2``, or ``the parameters outside the layers``."""
    if row["layer"] < 0:
        return "the parameters outside the layers"
    stack = "" if row["stack"] in {"", "decoder"} else f"{row['stack']} "
    return f"{stack}layer {row['layer']}"
