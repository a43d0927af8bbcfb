"""Tables of a store: samples, token ids, group values."""

from __future__ import annotations

import html as html_module
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from fisherscope.errors import CorruptStoreError, NotStoredError
from fisherscope.linalg import Moments
from fisherscope.linalg.normalization import factors
from fisherscope.store import aggregates
from fisherscope.store.index import Chunk, TaskIndex
from fisherscope.store.keys import read_keys
from fisherscope.store.opened import OpenStore
from fisherscope.store.plan import GROUP_DOT, GROUP_SIZES, SAMPLE_COLUMNS
from fisherscope.words import counted

_CHUNK_BYTES = 32 << 20


def column(store: OpenStore, index: TaskIndex, name: str) -> NDArray[Any]:
    """One of the ``sample/*`` datasets over all committed samples, in task order."""
    dtype = SAMPLE_COLUMNS[name]
    out = np.empty(len(index), dtype=dtype)
    for chunk in index.chunks(np.arange(len(index))):
        shard = store.shard(chunk.segment.shard)
        out[chunk.targets] = shard.rows(name, (len(chunk.segment.rows),), dtype, chunk.positions)
    return out


def samples(store: OpenStore, index: TaskIndex) -> pd.DataFrame:
    """The table of :meth:`ContributionStore.samples`."""
    task = index.task.name
    if not np.array_equal(column(store, index, "sample/row"), index.rows):
        raise CorruptStoreError(
            f"{store.path}: the rows in the shards of task {task!r} are not the journal's"
        )
    keys = read_keys(store.path, index.task.extents)
    frame = pd.DataFrame(
        {
            "id": [f"{task}_{row}" for row in index.rows],
            "row": index.rows,
            "key": [keys[row] for row in index.rows],
            **{
                name: column(store, index, f"sample/{name}")
                for name in ("length", "tokens", "loss", "truncated")
            },
        }
    )
    texts = _texts(store, index)
    return frame if texts is None else frame.assign(text=pd.Series(texts, dtype="str"))


def _texts(store: OpenStore, index: TaskIndex) -> list[str | None] | None:
    texts: list[str | None] = [None] * len(index)
    stored = False
    for chunk in index.chunks(np.arange(len(index))):
        if "text/bytes" not in store.shard(chunk.segment.shard):
            continue
        stored = True
        for target, values in zip(
            chunk.targets, ragged(store, chunk, "text", "text/bytes", "uint8"), strict=True
        ):
            texts[target] = values.tobytes().decode(errors="replace") if len(values) else None
    return texts if stored else None


def ragged(
    store: OpenStore, chunk: Chunk, family: str, name: str, dtype: str, columns: tuple[int, ...] = ()
) -> Iterator[NDArray[Any]]:
    """The values of each sample of a chunk, of one ragged dataset: ``[entries, *columns]``."""
    shard, n = store.shard(chunk.segment.shard), len(chunk.segment.rows)
    shard.check(f"{family}/offsets")
    offsets = shard.view(f"{family}/offsets", (n + 1,), "int64")
    total = shard.dataset(name).spec.shape
    values = shard.view(name, total, dtype)
    if offsets[0] != 0 or (np.diff(offsets) < 0).any() or total != (int(offsets[-1]), *columns):
        raise CorruptStoreError(f"{shard.path}: {family}/offsets do not describe {name!r}")
    entry = values.itemsize * math.prod(columns)
    for position in chunk.positions:
        start, stop = int(offsets[position]), int(offsets[position + 1])
        shard.check(name, [(start * entry, stop * entry)])
        yield np.array(values[start:stop])


def token_ids(store: OpenStore, index: TaskIndex, row: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Input ids and labels of one row."""
    chunk = _chunk_of(index, row)
    if "ids/input" not in store.shard(chunk.segment.shard):
        raise NotStoredError(f"{store.path} holds no token ids: collect again")
    (ids,) = ragged(store, chunk, "ids", "ids/input", "int32")
    (labels,) = ragged(store, chunk, "labels", "labels/ids", "int32")
    return ids, labels


def token_types(store: OpenStore, index: TaskIndex, row: int) -> NDArray[np.int32] | None:
    """Token types of one row; None where the task has none."""
    chunk = _chunk_of(index, row)
    if "types/ids" not in store.shard(chunk.segment.shard):
        return None
    (types,) = ragged(store, chunk, "types", "types/ids", "int32")
    return types if len(types) else None


def _chunk_of(index: TaskIndex, row: int) -> Chunk:
    """Where one row is.

    Raises:
        KeyError: it is not committed.
    """
    place = int(np.searchsorted(index.rows, row))
    if place == len(index) or index.rows[place] != row:
        raise KeyError(f"task {index.task.name!r} has no committed row {row}")
    (chunk,) = index.chunks(np.array([place]))
    return chunk


def group_rows(
    store: OpenStore, index: TaskIndex, name: str, chosen: NDArray[np.int64]
) -> NDArray[np.float32]:
    """``groups/square``, ``groups/norm`` or ``groups/dot`` of some samples, ``[n, groups]``."""
    width = len(store.header.groups)
    out = np.empty((len(chosen), width), dtype=np.float32)
    for chunk in index.chunks(chosen):
        shard = store.shard(chunk.segment.shard)
        out[chunk.targets] = shard.rows(name, (len(chunk.segment.rows), width), "float32", chunk.positions)
    return out


def group_squares(store: OpenStore, index: TaskIndex, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """``sum g ** 2`` of some samples, ``[n, groups]``: as stored, or from the norms that are stored."""
    values = group_rows(store, index, GROUP_SIZES[store.header.squares], chosen).astype(np.float64)
    return np.square(values, out=values) if store.header.squares == "wide" else values


def squared_factors(store: OpenStore, index: TaskIndex) -> NDArray[np.float64]:
    """The factor by which C_i = h_i ** 2 differs from g_i ** 2, ``[n]``."""
    tokens = np.maximum(column(store, index, "sample/tokens"), 1)
    return factors(tokens, store.header.normalization) ** 2


def group_contributions(store: OpenStore, index: TaskIndex) -> NDArray[np.float64]:
    """Contributions per sample and group."""
    squares = group_squares(store, index, np.arange(len(index)))
    return np.multiply(squares, squared_factors(store, index)[:, None], dtype=np.float64)


def groups(store: OpenStore, index: TaskIndex, labels: str) -> pd.DataFrame:
    """The table of :meth:`ContributionStore.groups`."""
    frame = store.header.groups.frame()
    moments = _moments(store, index) if labels == "data" else aggregates.moments(store, index, labels)
    size = frame["size"].to_numpy()
    theta = aggregates.constants(store).get("groups/theta_square")
    if theta is not None and theta.shape != (len(frame),):
        raise CorruptStoreError(f"{store.path}: groups/theta_square has shape {theta.shape}")
    return frame.assign(
        count=moments.count,
        sum=moments.mean if moments.count else np.nan,
        mean=moments.mean / size if moments.count else np.nan,
        variance=moments.variance / size.astype(np.float64) ** 2,
        theta_square=np.nan if theta is None else theta,
    )


def _moments(store: OpenStore, index: TaskIndex) -> Moments:
    """Of the group contributions; rows of a task are read in order, in bounded pieces."""
    factors = squared_factors(store, index)
    width = len(store.header.groups)
    moments = Moments.empty(width)
    step = max(1, _CHUNK_BYTES // max(8 * width, 1))
    for start in range(0, len(index), step):
        chosen = np.arange(start, min(start + step, len(index)))
        squares = group_squares(store, index, chosen)
        moments = moments.merge(Moments.of(squares * factors[chosen, None]))
    return moments


def group_values(store: OpenStore, index: TaskIndex, chosen: NDArray[np.int64]) -> xr.Dataset:
    """The dataset of :meth:`ContributionStore.group_values`."""
    rows = index.rows[chosen]
    frame = store.header.groups.frame()
    coordinates: dict[str, Any] = {
        "id": ("sample", [f"{index.task.name}_{row}" for row in rows]),
        "row": ("sample", rows),
        "tokens": ("sample", column(store, index, "sample/tokens")[chosen]),
        **{name: ("group", frame[name].to_numpy()) for name in frame.columns},
    }
    return xr.Dataset(
        {
            "square": (("sample", "group"), group_squares(store, index, chosen)),
            "dot": (("sample", "group"), group_rows(store, index, GROUP_DOT, chosen)),
        },
        coords=coordinates,
        attrs={"task": index.task.name, "normalization": store.header.normalization},
    )


def _lines(store: OpenStore) -> list[tuple[str, str]]:
    return [
        (
            task,
            f"{store.committed(task)} of {counted(store.n(task), 'sample')}"
            + ("" if store.is_complete(task) else " (incomplete)"),
        )
        for task in store.tasks
    ]


def representation(store: OpenStore) -> str:
    """One line in words."""
    tasks = ", ".join(f"{task}: {text}" for task, text in _lines(store)) or "no tasks"
    return (
        f"<ContributionStore {str(store.path)!r} ({store.layout.model_type}): {tasks}; "
        f"{counted(len(store.parameters), 'parameter')}, gradients: {store.header.gradients_in_words}>"
    )


def html(store: OpenStore) -> str:
    """A small table for notebooks."""
    rows = "".join(
        f"<tr><td>{html_module.escape(task)}</td><td>{html_module.escape(text)}</td></tr>"
        for task, text in _lines(store)
    )
    return (
        f"<p><b>ContributionStore</b> <code>{html_module.escape(str(store.path))}</code>: "
        f"{html_module.escape(store.layout.model_type)}, {counted(len(store.parameters), 'parameter')}, "
        f"gradients: {html_module.escape(store.header.gradients_in_words)}</p>"
        f"<table><tr><th>task</th><th>samples</th></tr>{rows}</table>"
    )
