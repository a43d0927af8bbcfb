"""Reading snapshots and constants: sums over ranks, in order of rank and in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherscope.errors import CorruptStoreError, NotStoredError
from fisherscope.layout import ParameterSlice
from fisherscope.linalg import Moments
from fisherscope.linalg.scaling import LIMIT, as_float32
from fisherscope.store.dtypes import to_tensor
from fisherscope.store.index import TaskIndex
from fisherscope.store.mapped import MappedShard
from fisherscope.store.names import escape_path, unescape_path
from fisherscope.store.opened import OpenStore
from fisherscope.store.schema import StoreHeader
from fisherscope.store.units import LOST, is_whole, unit_of


def mean_of(
    store: OpenStore,
    index: TaskIndex,
    parameter: str,
    prefix: str,
    piece: ParameterSlice | None = None,
) -> Tensor:
    """Mean over samples of a summed array of a parameter, or of one slice of it.

    Float32, or float64 where float32 cannot hold every value.
    """
    shape = store.layout.parameter(parameter).shape
    count = sum(snapshot.count for snapshot in index.snapshots)
    sums = total(store, index, f"{prefix}/{parameter}", shape, piece)
    if not count:
        raise NotStoredError(f"the snapshots of task {index.task.name!r} cover no samples: resume the run")
    return as_float32(sums / count)


def total(
    store: OpenStore,
    index: TaskIndex,
    name: str,
    shape: tuple[int, ...] | None = None,
    piece: ParameterSlice | None = None,
) -> Tensor:
    """Sum over ranks of one array of the snapshots, float64, in units of 1.

    Raises:
        NotStoredError: the snapshots have no such array, or there is none yet.
    """
    if not index.snapshots:
        raise NotStoredError(
            f"no aggregate of task {index.task.name!r} is committed yet: let the run finish, or resume it"
        )
    dataset = escape_path(name)
    sums: Tensor | None = None
    for snapshot in index.snapshots:
        shard = store.shard(snapshot.shard)
        if dataset not in shard:
            raise NotStoredError(_what_to_collect(store, name))
        values = sums_in(store.header, shard, name, shape, piece)
        sums = values if sums is None else sums + values
    assert sums is not None
    return sums


def sums_in(
    header: StoreHeader,
    shard: MappedShard,
    name: str,
    shape: tuple[int, ...] | None = None,
    piece: ParameterSlice | None = None,
) -> Tensor:
    """One array of a snapshot in float64, with what rounding took from it, in units of 1."""
    values = _array(shard, escape_path(name), shape, piece).double()
    lost = escape_path(f"{LOST}/{name}")
    if lost in shard:
        values += _array(shard, lost, shape, piece).double()
    exponent = exponent_in(header, shard, name)
    return values * 2.0**-exponent if exponent else values


def exponent_in(header: StoreHeader, shard: MappedShard, name: str) -> int:
    """The k of an array that a snapshot holds in units of ``2 ** -k``; 0 where it says nothing."""
    where = unit_of(header, name)
    if where is None or escape_path(where.name) not in shard:
        return 0
    exponents = _array(shard, escape_path(where.name), None, None).tolist()
    if len(exponents) != where.size or any(abs(e) > LIMIT for e in exponents):
        raise CorruptStoreError(f"{shard.path}: {where.name!r} holds no exponents: restore it from a copy")
    return int(exponents[where.place]) * where.power


def _array(
    shard: MappedShard, name: str, shape: tuple[int, ...] | None, piece: ParameterSlice | None
) -> Tensor:
    spec = shard.dataset(name).spec
    expected: tuple[str, ...] = ("float32", "float64")
    if unescape_path(name).startswith(f"{LOST}/"):
        expected = ("bfloat16",)
    elif is_whole(unescape_path(name)):
        expected = ("int64",)
    if spec.dtype not in expected:
        raise CorruptStoreError(f"{shard.path}: {name!r} cannot be {spec.dtype}: restore it from a copy")
    view = shard.view(name, spec.shape if shape is None else shape, spec.dtype)
    if piece is None:
        return shard.tensor(name)
    start, stop = 0, spec.nbytes
    leading = next((cut for cut in piece.cuts if cut.axis == 0), None)
    if leading is not None:
        row = view[:1].nbytes
        start, stop = leading.start * row, leading.stop * row
    shard.check(name, [(start, stop)])
    index: list[Any] = [slice(None)] * len(spec.shape)
    for cut in piece.cuts:
        index[cut.axis] = slice(cut.start, cut.stop, cut.step)
    return to_tensor(np.array(view[tuple(index)], order="C"), spec.dtype)


def _what_to_collect(store: OpenStore, name: str) -> str:
    if name.startswith(("fisher/", "mean/")) and store.header.fisher_shape == "groups":
        return (
            f"{store.path} holds group values only, not {name!r}: collect again with "
            "extensions=(Fisher(shape='full'), ...)"
        )
    if name.startswith("fisher/"):
        return f"{store.path} holds no Fisher {_extension_for(name.split('/')[1])}"
    if name.startswith("moments/"):
        return f"{store.path} holds no group values {_extension_for(name.split('/')[1])}"
    if name.startswith("kronecker/"):
        return _kronecker_to_collect(store, name.split("/", 2)[2])
    return f"{store.path} holds no aggregate {name!r}: collect again with the extension that emits it"


def _kronecker_to_collect(store: OpenStore, module: str) -> str:
    if "kronecker" not in store.header.options.get("extensions", {}):
        return f"{store.path} holds no Kronecker factors: collect again with extensions=(..., 'kronecker')"
    return (
        f"{store.path} holds no Kronecker factors of {module!r}: Kronecker(parameters=...) left it out, or "
        "its gradients are no sums over the positions of samples, as the collection warned"
    )


def _extension_for(labels: str) -> str:
    sources = "'data'" if labels == "data" else f"('data', {labels!r})"
    wanted = "ExactPerToken()" if labels == "exact_per_token" else f"Fisher(labels={sources})"
    return f"of labels={labels!r}: collect again with extensions=({wanted}, ...)"


def moments(store: OpenStore, index: TaskIndex, labels: str) -> Moments:
    """Moments of the group contributions under other labels than the data's, merged in order of rank.

    Raises:
        NotStoredError: they were not collected.
    """
    names = {part: escape_path(f"moments/{labels}/{part}") for part in ("count", "mean", "m2")}
    merged = Moments.empty(len(store.header.groups))
    if not index.snapshots:
        total(store, index, names["count"])
    for snapshot in index.snapshots:
        shard = store.shard(snapshot.shard)
        if names["mean"] not in shard:
            raise NotStoredError(_what_to_collect(store, f"moments/{labels}"))
        count, mean, m2 = (_array(shard, name, None, None).numpy() for name in names.values())
        merged = merged.merge(Moments(int(count[0]), mean, m2))
    return merged


def constants(store: OpenStore) -> dict[str, NDArray[Any]]:
    """The store's constant arrays by name; the lowest rank's count."""
    found: dict[str, NDArray[Any]] = {}
    for record in (ledger.constants for ledger in store.ledgers if ledger.constants is not None):
        shard = store.shard(record.shard)
        for dataset in record.shard.datasets:
            tensor = shard.tensor(dataset.name)
            values = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            found.setdefault(unescape_path(dataset.name), values.numpy())
    return found
