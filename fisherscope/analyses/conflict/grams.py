"""Gram matrices of natural gradients: per slice, added up to blocks, layers, the whole; and per parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherscope.analyses.config import ConflictConfig
from fisherscope.analyses.conflict.whitening import BlockScales, Whitening
from fisherscope.analyses.conflict.windows import Windows
from fisherscope.analyses.slices import Block, Loaded, SliceReader, Whole, stored_blocks
from fisherscope.layout import ParameterInfo
from fisherscope.linalg.scaling import LIMIT

Gram = NDArray[np.float64]

_SMALL = 1e-12  # products of larger entries than this, and of smaller ones than its inverse, are no danger


@dataclass(frozen=True)
class Place:
    """Of which parameters a Gram matrix is.

    Attributes:
        level: "slice", "block", "layer", "whole" (all attention weights), "parameter" or "module" (an MLP).
        stack, layer, block, head: where; "" and -1 without meaning.
        parameter: name of the parameter, or path of the module.
        ridge: lam as applied to a slice; NaN elsewhere, and where tasks have lam of their own.
        flat: F is 0 throughout the slice.
    """

    level: str
    stack: str = ""
    layer: int = -1
    block: str = ""
    head: int = -1
    parameter: str = ""
    ridge: float = float("nan")
    flat: bool = False


@dataclass
class GramStream:
    """Goes once through the stored gradients of some tasks, one slice in memory at a time.

    Attributes:
        reader: where gradients come from.
        windows: samples of each task, in order, and what is averaged.
        config: the metric.
    """

    reader: SliceReader
    windows: dict[str, Windows]
    config: ConflictConfig
    whitening: Whitening = field(init=False)

    def __post_init__(self) -> None:
        self.whitening = Whitening(self.reader, tuple(self.windows), self.config)

    def attention(self) -> Iterator[tuple[Place, Gram]]:
        """Grams ``[n, n]`` of the attention weights, float64, the tasks' samples one after the other.

        Slices come before the block that they add up to, blocks before their layer, layers before the whole;
        a parameter comes as soon as blocks have made it up. A matrix is not to be changed, and is not kept.
        """
        whole: Any = 0
        self._made_up: set[str] = set()
        layers: dict[tuple[str, int], list[Block]] = {}
        for block in stored_blocks(self.reader.store):
            layers.setdefault((block.attention.stack, block.attention.layer), []).append(block)
        for (stack, layer), blocks in layers.items():
            layer_gram: Any = 0
            parts: dict[str, tuple[int, Any]] = {}
            for block in blocks:
                block_gram: Any = 0
                for place, gram in self._slices(block):
                    yield place, gram
                    block_gram = block_gram + gram
                yield Place("block", stack, layer, block.name), block_gram
                layer_gram = layer_gram + block_gram
                entries, gram = parts.get(name := block.partition.parameter, (0, 0))
                entries, gram = entries + len(block) * block.partition.slice_size, gram + block_gram
                parts[name] = entries, gram
                info = self.reader.store.layout.parameter(name)
                if entries == math.prod(info.shape):
                    self._made_up.add(name)
                    yield _of_parameter(info), parts.pop(name)[1]
            yield Place("layer", stack, layer), layer_gram
            whole = whole + layer_gram
        yield Place("whole"), whole

    def parameters(self) -> Iterator[tuple[Place, Gram]]:
        """Grams of the other parameters whose gradients are stored, and of each MLP after its parameters.

        To be asked for after :meth:`attention`.
        """
        stored = set(self.reader.store.gradient_parameters) - self._made_up
        layout = self.reader.store.layout
        modules = {
            name: mlp.module for mlp in layout.mlps for name in {p.parameter for p in mlp.partitions} & stored
        }
        left = {module: [*modules.values()].count(module) for module in modules.values()}
        sums: dict[str, Any] = {}
        for info in layout.parameters:
            if info.name not in stored:
                continue
            gram = self._gram(Whole(info), 0, self.whitening.block(Whole(info)))
            yield _of_parameter(info), gram
            if (module := modules.get(info.name)) is None:
                continue
            sums[module] = sums.get(module, 0) + gram
            left[module] -= 1
            if not left[module]:
                place = Place("module", info.stack, info.layer, info.kind, parameter=module)
                yield place, sums.pop(module)

    def _slices(self, block: Block) -> Iterator[tuple[Place, Gram]]:
        scales = self.whitening.block(block)
        self.reader.hold(block, self._rows)
        lam = [self.reader.lam_of(lam) for lam in scales.lam.values()]
        ridge = lam[0] if len(set(lam)) == 1 else float("nan")
        stack, layer = block.attention.stack, block.attention.layer
        for head in range(len(block)):
            flat = scales.is_flat(head)
            yield (
                Place("slice", stack, layer, block.name, head, ridge=ridge, flat=flat),
                self._gram(block, head, scales),
            )

    @property
    def _rows(self) -> dict[str, int]:
        return {task: windows.rows for task, windows in self.windows.items()}

    def _gram(self, block: Block | Whole, head: int, scales: BlockScales) -> Gram:
        """Gram matrix of the natural gradients of one slice."""
        loaded = Loaded(self.reader, block, head, self._rows)
        starts = dict(zip(self._rows, np.cumsum([0, *self._rows.values()]).tolist(), strict=False))

        def natural() -> Iterator[tuple[slice, Tensor]]:
            for task, start in starts.items():
                factors = self.reader.factors(task)
                for chunk, gradients in loaded(task):
                    place = slice(start + chunk.start, start + chunk.stop)
                    yield place, scales.natural(task, head, chunk, gradients * factors[chunk, None])

        n = sum(self._rows.values())
        if loaded.fits:
            together = torch.cat([values for _, values in natural()])
            gram = inner(together, together)
        else:
            gram = np.empty((n, n))
            for place, left in natural():
                for other, right in natural():
                    if other.start >= place.start:
                        part = inner(left, right)
                        gram[place, other] = part
                        gram[other, place] = part.T
        return Windows.average(gram, [*self.windows.values()])


def inner(left: Tensor, right: Tensor) -> Gram:
    """Inner products of the rows ``[n, k]`` and ``[m, k]``, float64 ``[n, m]``.

    Very small and very large rows have powers of two of their own: no product leaves float32's range.
    """
    powers = []
    for rows in (left, right) if right is not left else (left,):
        size = torch.maximum(rows.amax(1), -rows.amin(1)).double()
        usual = (size == 0) | ((size > _SMALL) & (size < 1 / _SMALL))
        powers.append(torch.where(usual, 0, -torch.frexp(size)[1]).clamp(-LIMIT, LIMIT))
    if not any(bool(p.any()) for p in powers):
        return (left @ right.T).numpy().astype(np.float64)
    scaled = [
        rows * torch.exp2(p.double()).to(rows.dtype)[:, None]
        for rows, p in zip((left, right), (powers[0], powers[-1]), strict=True)
    ]
    product = (scaled[0] @ scaled[1].T).double()
    return (product / torch.exp2((powers[0][:, None] + powers[-1]).double())).numpy()


def _of_parameter(info: ParameterInfo) -> Place:
    return Place("parameter", info.stack, info.layer, info.kind, parameter=info.name)
