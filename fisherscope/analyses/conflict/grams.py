"""Gram matrices of natural gradients of two tasks: per slice, added up to blocks, layers, the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherscope.analyses.config import ConflictConfig
from fisherscope.analyses.conflict.cosines import Level, cosines, whiten
from fisherscope.analyses.slices import Block, Loaded, SliceReader, damping, stored_blocks


@dataclass
class PairGrams:
    """All that is kept of a pair of tasks.

    Attributes:
        first: samples of the first task, which come before those of the second.
        rows: one per slice, block, layer and the whole: level, stack, layer, block, head, ridge, flat and
            the numbers of :class:`~fisherscope.analyses.conflict.cosines.Level`.
        slices: stack, layer, block, head of each slice, by number.
        cosine: whole-model cosines across tasks ``[n_a, n_b]``.
        lowest: lowest cosine over the slices ``[n_a, n_b]``; infinite where no slice has one.
        lowest_slice: number of that slice ``[n_a, n_b]``; -1 where there is none.
    """

    first: int
    cosine: NDArray[np.float64]
    lowest: NDArray[np.float32]
    lowest_slice: NDArray[np.int32]
    rows: list[dict[str, Any]] = field(default_factory=list)
    slices: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def empty(cls, n_a: int, n_b: int) -> PairGrams:
        """Of two tasks with so many samples, before any slice."""
        shape = (n_a, n_b)
        return cls(
            n_a, np.full(shape, np.nan), np.full(shape, np.inf, np.float32), np.full(shape, -1, np.int32)
        )

    def note(self, place: dict[str, Any], gram: NDArray[np.float64]) -> NDArray[np.float64]:
        """Summarise the cosines of one place, and return those across tasks."""
        cosine = cosines(gram)
        level = Level.of(cosine, self.first)
        self.rows.append({**place, **vars(level), "excess": level.excess})
        return cosine[: self.first, self.first :]

    def note_slice(self, place: dict[str, Any], gram: NDArray[np.float64]) -> None:
        """Summarise a head slice, and remember the pairs that are lowest there."""
        across = self.note(place, gram)
        lower = across < self.lowest
        np.copyto(self.lowest, across, where=lower, casting="same_kind")
        self.lowest_slice[lower] = len(self.slices)
        self.slices.append({key: place[key] for key in ("stack", "layer", "block", "head")})


def pair_grams(
    reader: SliceReader, a: str, b: str, rows: dict[str, int], config: ConflictConfig
) -> PairGrams:
    """Go once through all head slices of two tasks, one slice in memory at a time.

    Natural gradients use the pooled ``F = (F_a + F_b) / 2`` and lam of the block. Grams are summed in
    float64; the Gram of a block is the sum of those of its slices, and so on.
    """
    n = rows[a] + rows[b]
    found = PairGrams.empty(rows[a], rows[b])
    whole = np.zeros((n, n))
    layers: dict[tuple[str, int], list[Block]] = {}
    for block in stored_blocks(reader.store):
        layers.setdefault((block.attention.stack, block.attention.layer), []).append(block)
    for (stack, layer), blocks in layers.items():
        layer_gram = np.zeros_like(whole)
        for block in blocks:
            block_gram = np.zeros_like(whole)
            for place, gram in _slice_grams(reader, block, a, b, rows, config):
                block_gram += gram
                found.note_slice(place, gram)
            found.note({"level": "block", **block.key, "head": -1}, block_gram)
            layer_gram += block_gram
        found.note({"level": "layer", "stack": stack, "layer": layer, "block": "", "head": -1}, layer_gram)
        whole += layer_gram
    place = {"level": "whole", "stack": "", "layer": -1, "block": "", "head": -1}
    found.cosine = found.note(place, whole)
    return found


def _slice_grams(
    reader: SliceReader, block: Block, a: str, b: str, rows: dict[str, int], config: ConflictConfig
) -> Iterator[tuple[dict[str, Any], NDArray[np.float64]]]:
    fisher = (reader.fisher(a, block) + reader.fisher(b, block)) / 2
    lam = damping(fisher, config)
    for head in range(len(block)):
        flat = not bool((fisher[head] > 0).any())
        place = {"level": "slice", **block.key, "head": head, "ridge": lam, "flat": flat}
        loaded = Loaded(reader, block, head, {task: rows[task] for task in (a, b)})
        yield place, _gram(loaded, a, b, rows, fisher[head], lam)


def _gram(
    loaded: Loaded, a: str, b: str, rows: dict[str, int], fisher: Tensor, lam: float
) -> NDArray[np.float64]:
    """Gram matrix ``[n_a + n_b, n_a + n_b]`` of the natural gradients of one slice, float64."""
    n = rows[a] + rows[b]
    first = {a: 0, b: rows[a]}

    def natural() -> Iterator[tuple[slice, Tensor]]:
        for task, start in first.items():
            scale = loaded.reader.factors(task)
            for chunk, gradients in loaded(task):
                place = slice(start + chunk.start, start + chunk.stop)
                yield place, whiten(gradients * scale[chunk, None], fisher, lam)

    if loaded.fits:
        together = torch.cat([values for _, values in natural()])
        return (together @ together.T).numpy().astype(np.float64)
    gram = np.empty((n, n))
    for place, left in natural():
        for other, right in natural():
            if other.start >= place.start:
                part = (left @ right.T).numpy()
                gram[place, other] = part
                gram[other, place] = part.T
    return gram
