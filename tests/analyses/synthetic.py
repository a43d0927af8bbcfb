"""Tiny stores, written through the real writer from gradients that the tests can see."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fisherscope.layout import (
    AttentionLayout,
    GroupTable,
    HeadBlock,
    MlpLayout,
    ModelLayout,
    ParameterInfo,
    Partition,
)
from fisherscope.store import ContributionStore, StoreHeader, StoreWriter, open_store

WIDTH, HEAD, QUERIES, KV, CHANNELS, LAYERS = 8, 4, 4, 2, 6, 2


def make_layout(layers: int = LAYERS) -> ModelLayout:
    """Four query and two kv heads of width 4 in each layer, biases on Q, K, V, an MLP of six channels."""
    parameters = [ParameterInfo("embed.weight", (20, WIDTH), "embedding")]
    attention, mlps = [], []
    for layer in range(layers):
        root = f"layers.{layer}"
        blocks = []
        for name, heads in (("Q", QUERIES), ("K", KV), ("V", KV)):
            path, rows = f"{root}.attn.{name.lower()}", heads * HEAD
            parameters.append(ParameterInfo(f"{path}.weight", (rows, WIDTH), "attention", layer))
            parameters.append(ParameterInfo(f"{path}.bias", (rows,), "attention", layer))
            weight = Partition.regular(f"{path}.weight", (rows, WIDTH), 0, heads, HEAD)
            bias = Partition.regular(f"{path}.bias", (rows,), 0, heads, HEAD)
            blocks.append(HeadBlock(name, weight, bias))
        shape = (WIDTH, QUERIES * HEAD)
        parameters.append(ParameterInfo(f"{root}.attn.o.weight", shape, "attention", layer))
        blocks.append(HeadBlock("O", Partition.regular(f"{root}.attn.o.weight", shape, 1, QUERIES, HEAD)))
        attention.append(AttentionLayout(layer, f"{root}.attn", f"{root}.attn.o", QUERIES, KV, tuple(blocks)))
        pieces = []
        for name, shape, axis in (
            ("gate", (CHANNELS, WIDTH), 0),
            ("up", (CHANNELS, WIDTH), 0),
            ("down", (WIDTH, CHANNELS), 1),
        ):
            parameters.append(ParameterInfo(f"{root}.mlp.{name}.weight", shape, "mlp", layer))
            pieces.append(Partition.regular(f"{root}.mlp.{name}.weight", shape, axis, CHANNELS, 1))
        mlps.append(MlpLayout(layer, f"{root}.mlp", tuple(pieces)))
        parameters.append(ParameterInfo(f"{root}.norm.weight", (WIDTH,), "norm", layer))
    return ModelLayout("tiny", tuple(parameters), tuple(attention), tuple(mlps))


@dataclass
class Task:
    """What the store of one task is made of.

    Attributes:
        gradients: signed g per parameter ``[n, *shape]``.
        tokens, length: per sample.
        text: per sample.
    """

    gradients: dict[str, Tensor]
    tokens: np.ndarray
    length: np.ndarray
    text: list[str]

    @property
    def n(self) -> int:
        return len(self.tokens)

    def h(self, parameter: str) -> Tensor:
        """g / sqrt(T), the default normalisation, float64."""
        g = self.gradients[parameter].double()
        return g / torch.from_numpy(self.tokens).double().sqrt().view(-1, *(1,) * (g.dim() - 1))

    def permuted(self, order: list[int]) -> Task:
        return Task(
            {name: g[order] for name, g in self.gradients.items()},
            self.tokens[order],
            self.length[order],
            [self.text[i] for i in order],
        )

    def scaled(self, factor: float) -> Task:
        return Task({k: g * factor for k, g in self.gradients.items()}, self.tokens, self.length, self.text)


def make_task(layout: ModelLayout, name: str, n: int, seed: int) -> Task:
    """Random gradients with heads of unlike scale, unequal lengths, and a shared direction per task."""
    generator = torch.Generator().manual_seed(seed)
    gradients = {}
    for info in layout.parameters[1:]:
        scale = torch.rand(info.shape, generator=generator).square() + 0.01
        own = torch.randn(info.shape, generator=generator)
        noise = torch.randn((n, *info.shape), generator=generator)
        gradients[info.name] = (noise + 0.5 * own) * scale * 1e-3
    tokens = torch.randint(1, 9, (n,), generator=generator).numpy()
    return Task(gradients, tokens, tokens + 3, [f"{name} text {i} <script>" for i in range(n)])


@dataclass
class Made:
    """A store and what it was made of."""

    store: ContributionStore
    layout: ModelLayout
    tasks: dict[str, Task]
    theta: dict[str, Tensor] = field(default_factory=dict)


def write_store(
    path: Path,
    layout: ModelLayout,
    tasks: dict[str, Task],
    *,
    fisher_shape: str = "full",
    gradients: bool = True,
    commit: dict[str, int] | None = None,
    text: bool = True,
    without: tuple[str, ...] = (),
    kinds: tuple[str, ...] = ("attention",),
) -> Made:
    """Write a complete store (or only the first ``commit`` rows of a task) and open it.

    Of the tasks in ``without``, samples are stored but not their gradients; of the others, those of the
    parameters of these ``kinds``.
    """
    names = tuple(info.name for info in layout.parameters[1:])
    chosen = tuple(info.name for info in layout.parameters if info.kind in kinds)
    header = StoreHeader(
        fingerprint={"test": 1},
        layout=layout,
        parameters=names,
        gradient_parameters=chosen if gradients else (),
        gradient_dtype="float32",
        normalization="per_token",
        fisher_shape=fisher_shape,
    )
    generator = torch.Generator().manual_seed(99)
    theta = {name: torch.randn(layout.parameter(name).shape, generator=generator) for name in names}
    table = GroupTable.build(layout, names)
    with StoreWriter.open(path, header, durability="none") as writer:
        writer.constants(
            {"groups/theta_square": _groups(table, {k: t[None] ** 2 for k, t in theta.items()})[0]}
        )
        for name, task in tasks.items():
            rows = task.n if commit is None else commit.get(name, task.n)
            writer.declare_task(name, [f"{name}-{i}" for i in range(task.n)])
            if rows:
                kept = name not in without
                _write_task(writer, name, task, rows, header, table, theta, text=text, gradients=kept)
    return Made(open_store(path), layout, tasks, theta)


def _groups(table: GroupTable, values: dict[str, Tensor]) -> np.ndarray:
    """Sums over each group of values ``[n, *shape]``: ``[n, groups]``."""
    n = len(next(iter(values.values())))
    out = torch.zeros(n, len(table), dtype=torch.float64)
    for name, members in table.members.items():
        for member in members:
            whole = values[name].double()
            pieces = (
                whole.reshape(n, -1).sum(1, keepdim=True)
                if member.partition is None
                else torch.stack([piece.take(whole).reshape(n, -1).sum(1) for piece in member.partition], 1)
            )
            out[:, member.first : member.first + pieces.shape[1]] += pieces
    return out.numpy()


def _write_task(writer, name, task, rows, header, table, theta, *, text, gradients):
    g = {k: v[:rows] for k, v in task.gradients.items()}
    encoded = [t.encode() for t in task.text[:rows]]
    lengths = [int(n) for n in task.length[:rows]]
    ragged = {"ids": lengths, "labels": lengths}
    if text:
        ragged["text"] = [len(t) for t in encoded]
    for first, last in ((0, rows // 2), (rows // 2, rows)):
        if first == last:
            continue
        part = slice(first, last)
        segment = writer.segment(
            name,
            range(first, last),
            ragged={k: sizes[part] for k, sizes in ragged.items()},
            gradients=gradients,
        )
        segment.put("sample/length", 0, task.length[part].astype(np.int32))
        segment.put("sample/tokens", 0, task.tokens[part].astype(np.int32))
        segment.put("sample/loss", 0, task.tokens[part].astype(np.float64))
        segment.put("sample/truncated", 0, np.zeros(last - first, np.int32))
        ids = [np.arange(n, dtype=np.int32) for n in task.length[part]]
        segment.put("ids/input", 0, ids)
        segment.put("labels/ids", 0, ids)
        if text:
            segment.put("text/bytes", 0, [np.frombuffer(t, np.uint8) for t in encoded[part]])
        square = _groups(table, {k: v[part].double() ** 2 for k, v in g.items()})
        dot = _groups(table, {k: v[part].double() * theta[k] for k, v in g.items()})
        segment.put("groups/square", 0, square.astype(np.float32))
        segment.put("groups/dot", 0, dot.astype(np.float32))
        for parameter in header.gradient_parameters if gradients else ():
            segment.put_gradient(parameter, 0, g[parameter][part])
        segment.commit()
    h = {k: task.h(k)[:rows] for k in g}
    contributions = _groups(table, {k: v**2 for k, v in h.items()})
    arrays = {
        "moments/mean": contributions.mean(0),
        "moments/m2": ((contributions - contributions.mean(0)) ** 2).sum(0),
    }
    if header.fisher_shape == "full":
        arrays |= {f"fisher/data/{k}": (v**2).sum(0).float() for k, v in h.items()}
        arrays |= {f"mean/{k}": v.sum(0).float() for k, v in h.items()}
    writer.snapshot(name, [0], rows, arrays)


def slice_of(layout: ModelLayout, values: Tensor, layer: int, block: str, head: int) -> Tensor:
    """Entries of one head slice out of ``[n, *shape]``: ``[n, size]``."""
    return layout.slice(layer, block, head).take(values).reshape(len(values), -1)


def all_slices(layout: ModelLayout):
    """(layer, block, head, parameter) of every weight slice."""
    for attention, block in layout.head_blocks():
        for head in range(block.heads):
            yield attention.layer, block.name, head, block.weight.parameter


def size_of(layout: ModelLayout, parameter: str) -> int:
    return math.prod(layout.parameter(parameter).shape)
