"""How many bytes a store will take, from what is to be stored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fisherscope.layout import GroupTable, ModelLayout
from fisherscope.store.dtypes import gradient_dtype, stored_type
from fisherscope.store.encodings import Encodings
from fisherscope.store.gradient_plan import BlockDataset, GradientPlan
from fisherscope.store.plan import SAMPLE_COLUMNS
from fisherscope.store.position_plan import PositionPlan

_SCALE = stored_type("float32").itemsize
_SUM = stored_type("float32").itemsize + stored_type("bfloat16").itemsize  # with what rounding took from it


@dataclass(frozen=True)
class Lengths:
    """Mean lengths of samples.

    Attributes:
        inputs: attended positions.
        targets: labels, which are the positions of an encoder-decoder's decoder.
    """

    inputs: float = 0.0
    targets: float = 0.0


def bytes_per_sample(
    layout: ModelLayout,
    parameters: Iterable[str],
    gradient_parameters: Iterable[str],
    dtype: str = "bfloat16",
    mean_tokens: float = 0.0,
    mean_text_bytes: float = 0.0,
    mean_labels: float | None = None,
    position_parameters: Iterable[str] = (),
    encodings: Encodings | None = None,
    gradient_share: float = 1.0,
) -> dict[str, float]:
    """Bytes that one sample takes in segments, up to page padding and file metadata (below 1 % of a shard).

    Args:
        layout: of the model.
        parameters: the instrumented ones.
        gradient_parameters: those whose gradients are stored.
        dtype: of stored gradients that are dense.
        mean_tokens: ids per sample.
        mean_text_bytes: bytes of text per sample; 0 where texts are not stored.
        mean_labels: labels per sample; by default as many as ids.
        position_parameters: matrices whose contributions of single positions are stored.
        encodings: of the gradients; all dense by default.
        gradient_share: of the samples, whose gradients are stored.

    Returns:
        ``samples`` (columns and offsets), ``tokens``, ``text``, ``groups``, ``gradients``, ``positions`` and
        ``total``.
    """
    groups = len(GroupTable.build(layout, parameters))
    offsets = stored_type("int64").itemsize * (2 + (mean_text_bytes > 0))
    labels = mean_tokens if mean_labels is None else mean_labels
    encodings, lengths = encodings or Encodings(), Lengths(mean_tokens, labels)
    gradients = gradient_bytes(layout, gradient_parameters, dtype, encodings, lengths)
    positions = _position_bytes(layout, position_parameters, mean_tokens, labels)
    if encodings.inputs and not positions:
        offsets += stored_type("int64").itemsize  # where the positions of each sample begin
    parts = {
        "samples": float(sum(stored_type(kind).itemsize for kind in SAMPLE_COLUMNS.values()) + offsets),
        "tokens": float(stored_type("int32").itemsize * (mean_tokens + labels)),
        "text": float(mean_text_bytes),
        "groups": float(2 * stored_type("float32").itemsize * groups),
        "gradients": gradients * gradient_share,
        "positions": positions,
    }
    return {**parts, "total": sum(parts.values())}


def gradient_bytes(
    layout: ModelLayout, parameters: Iterable[str], dtype: str, encodings: Encodings, lengths: Lengths
) -> float:
    """Bytes that the gradients of one sample take.

    Args:
        layout: of the model.
        parameters: those whose gradients are stored.
        dtype: of those that are dense.
        encodings: of the gradients.
        lengths: positions of the sample, on average.
    """
    item = stored_type(gradient_dtype(dtype)).itemsize
    plan = GradientPlan.build(layout, parameters, encodings)
    total = 0.0
    for dataset in plan.datasets:
        shape = dataset.shape(1)
        scales = dataset.heads if isinstance(dataset, BlockDataset) else shape[: -dataset.row_axes]
        total += item * math.prod(shape)
        if dtype == "float16":
            total += _SCALE * (scales if isinstance(scales, int) else math.prod(scales))
    for rows in plan.factors:
        count = {None: rows.rows, "labels": lengths.targets}.get(rows.family, lengths.inputs)
        total += count * row_bytes(rows.columns, encodings.dtype)
    return total + stored_type("float32").itemsize * len(plan.errors)


def row_bytes(columns: int, dtype: str) -> int:
    """Bytes of one row of a factor."""
    return columns * stored_type(dtype).itemsize + _SCALE * (dtype == "float16")


def _position_bytes(
    layout: ModelLayout, parameters: Iterable[str], mean_tokens: float, mean_labels: float
) -> float:
    datasets = PositionPlan.build(layout, parameters).datasets.values()
    columns = sum(d.columns * (mean_labels if d.family == "labels" else mean_tokens) for d in datasets)
    offsets = stored_type("int64").itemsize * any(d.family == "positions" for d in datasets)
    return float(stored_type("float32").itemsize * columns + offsets)


def snapshot_bytes(
    layout: ModelLayout,
    parameters: Iterable[str],
    *,
    fisher_shape: str = "full",
    labels: Sequence[str] = ("data",),
    mean: bool = True,
    kronecker: Iterable[str] = (),
) -> dict[str, float]:
    """Bytes of one snapshot of one task and rank.

    Args:
        layout: of the model.
        parameters: the instrumented ones.
        fisher_shape: "full" or "groups".
        labels: label sources of the Fisher.
        mean: whether the mean of h is kept beside a full Fisher.
        kronecker: weights of the linear maps whose Kronecker factors are collected.

    While a snapshot is replaced both are on the disk: count one more than there are tasks.

    Returns:
        ``fisher`` (one sum of 6 bytes an entry per label source), ``mean`` (likewise), ``moments``,
        ``kronecker`` (likewise; with a bias at most so much, as the layout does not say which axis is the
        input's) and ``total``.
    """
    chosen = set(parameters)
    groups = len(GroupTable.build(layout, chosen))
    entries = sum(math.prod(layout.parameter(name).shape) for name in chosen) * (fisher_shape == "full")
    exponents = stored_type("int64").itemsize * len(chosen) * (fisher_shape == "full")
    parts = {
        "fisher": float((_SUM * entries + exponents) * len(labels)),
        "mean": float(_SUM * entries * mean),
        "moments": float(16 * groups),
        "kronecker": float(sum(_factor_bytes(layout, name, chosen) for name in kronecker)),
    }
    return {**parts, "total": sum(parts.values())}


def _factor_bytes(layout: ModelLayout, parameter: str, instrumented: set[str]) -> int:
    shape = layout.parameter(parameter).shape
    if len(shape) != 2:
        return 0  # such as stacked experts, which have no factors
    small, large = sorted(shape)
    with_bias = parameter.removesuffix("weight") + "bias" in instrumented
    count = stored_type("int64").itemsize
    return _SUM * (small**2 + (large + with_bias) ** 2) + 3 * count
