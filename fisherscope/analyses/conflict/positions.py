"""Which positions of two samples carry the cosine of their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherscope.analyses.config import ConflictConfig
from fisherscope.analyses.conflict.position_factors import (
    Factors,
    FactorSource,
    Sample,
    Tokens,
    chosen_blocks,
    shared_side,
)
from fisherscope.analyses.conflict.position_grams import PositionGram
from fisherscope.analyses.conflict.position_view import PositionView, pair_frame, position_frame
from fisherscope.analyses.slices import Block, SliceReader, damping
from fisherscope.errors import NotStoredError, UsageError
from fisherscope.store import ContributionStore
from fisherscope.telling import Pace
from fisherscope.torch_state import in_standard_state

_DEFAULT = ConflictConfig()


@in_standard_state
def carrying_positions(
    store: ContributionStore,
    sample_a: str,
    sample_b: str,
    *,
    layer: int | None = None,
    block: str | None = None,
    head: int | None = None,
    stack: str | None = None,
    config: ConflictConfig = _DEFAULT,
    factors: Factors | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    memory_budget: int = 1 << 30,
    quiet: bool = False,
) -> PositionView:
    """Divide the cosine of two samples among their positions.

    The gradient of a weight is a sum over positions, ``g = sum_t d_t a_t'`` (output gradient times input). So
    the inner product of two natural gradients is a sum over pairs of positions, and so is the cosine.
    Position t of sample i carries ``sum_s <u_it, u_js> / (|u_i| |u_j|)``. Biases are left out, as in all
    cosines of ``conflict``, and so are blocks that are no matrices (sinks).

    Time grows with the square of the positions: about ``(T_a + T_b)^2 / 2`` multiplications per entry of the
    weights. It is meant for a short list of pairs.

    Args:
        store: with gradients stored as factors, else with ``factors``.
        sample_a: id of a sample, such as "math_7".
        sample_b: of the other.
        layer: of one layer only; by default of all attention weights whose gradients are stored (of all that
            are instrumented, where those of none are).
        block: of one block only: "Q", "K", "V" or "O".
        head: of one head of that layer and block: a query head of Q and O, a kv head of K and V.
        stack: "decoder", "encoder" or "cross", where there are several; all where None.
        config: metric and damping. The natural metric is that of the pooled ``F = (F_a + F_b) / 2`` of both
            tasks' contributions; with another ``fisher_pool`` or ``fisher_weighting`` the cosines of
            ``conflict`` are others than those divided here.
        factors: what ``scope.factors(store, ids)`` returns; it goes before what the store holds.
        resamples: of the bootstrap.
        confidence: of its interval.
        seed: of its draws.
        memory_budget: bytes.
        quiet: say nothing on stderr; else, where it takes long, how long it will take.

    Returns:
        A :class:`PositionView`.

    Raises:
        KeyError: no such sample, layer or block.
        IndexError: no such head.
        ValueError: a head without its layer and block, or weights that see different positions.
        NotStoredError: gradients are not there by position, or F is not there.
        MemoryBudgetError: the samples have too many positions.
    """
    (view,) = carrying_positions_of_pairs(
        store,
        [(sample_a, sample_b)],
        layer=layer,
        block=block,
        head=head,
        stack=stack,
        config=config,
        factors=factors,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
        memory_budget=memory_budget,
        quiet=quiet,
    )
    return view


@in_standard_state
def carrying_positions_of_pairs(
    store: ContributionStore,
    pairs: Sequence[tuple[str, str]],
    *,
    layer: int | None = None,
    block: str | None = None,
    head: int | None = None,
    stack: str | None = None,
    config: ConflictConfig = _DEFAULT,
    factors: Factors | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    memory_budget: int = 1 << 30,
    quiet: bool = False,
) -> list[PositionView]:
    """As :func:`carrying_positions` for several pairs of samples; F of each weight is had only once.

    Returns:
        One view per pair.
    """
    if head is not None and (layer is None or block is None):
        raise UsageError(f"head={head} is a head of one block: give layer= and block=, too")
    if resamples < 1 or not 0 < confidence < 1:
        raise UsageError(f"resamples={resamples} must be at least 1, confidence={confidence} between 0 and 1")
    blocks = chosen_blocks(store, layer, block, stack)
    if head is not None:
        _ = [b.partition[head] for b in blocks]
    side = shared_side(store, blocks)
    found = [(Sample.find(store, a), Sample.find(store, b)) for a, b in pairs]
    tokens = {sample: Tokens.of(store, sample, side) for pair in found for sample in pair}
    source = FactorSource(store, factors)
    lengths = {sample: len(at.ids) for sample, at in tokens.items()}
    budget = memory_budget // max(1, len(found))
    grams = [PositionGram(lengths[a], lengths[b], budget) for a, b in found]
    scales = _Scales(store, config, memory_budget)
    heads = [range(len(each)) if head is None else range(head, head + 1) for each in blocks]
    entries = sum(len(h) * each.partition.slice_size for each, h in zip(blocks, heads, strict=True))
    squares = [(lengths[a] + lengths[b]) ** 2 for a, b in found]
    pace = Pace("carrying_positions", entries * sum(squares), quiet=quiet)
    for each, numbers in zip(blocks, heads, strict=True):
        for (a, b), gram, square in zip(found, grams, squares, strict=True):
            both = [source.read(sample, each, lengths[sample]) for sample in (a, b)]
            left, right = (torch.cat(sides) for sides in zip(*both, strict=True))
            left = left * 2.0**scales.exponent
            for number in numbers:
                _add_head(gram, left, right, each, number, scales.of((a.task, b.task), each))
                pace.advance(each.partition.slice_size * square)
    where = _where(layer, block, head, stack)
    views = []
    for (a, b), gram in zip(found, grams, strict=True):
        carried = gram.carried()
        low, high = carried.interval(confidence, resamples, seed)
        at = tokens[a], tokens[b]
        views.append(
            PositionView(
                sample_a=a.id,
                sample_b=b.id,
                where=where,
                metric=config.metric,
                cosine=carried.cosine,
                low=low,
                high=high,
                confidence=confidence,
                frame=position_frame(carried, (a.id, b.id), at),
                pairs=pair_frame(carried, at),
                source="model" if "model" in source.used else "store",
            )
        )
    return views


def _add_head(
    gram: PositionGram, left: Tensor, right: Tensor, block: Block, head: int, scales: Tensor | None
) -> None:
    partition = block.partition
    start, width = partition.starts[head], partition.width
    if partition.axis == 0:
        left = left.narrow(1, start, width)
    else:
        right = right.narrow(1, start, width)
    gram.add(left, right, None if scales is None else scales[head].view(partition.slice_shape))


class _Scales:
    """1 / sqrt(F + lam) of one block after the other, F once per task."""

    def __init__(self, store: ContributionStore, config: ConflictConfig, memory_budget: int) -> None:
        self._store, self._config = store, config
        self._reader = SliceReader(store, memory_budget)
        self.exponent = self._reader.exponent
        self._block: Block | None = None
        self._fishers: dict[str, Tensor] = {}
        self._scales: dict[tuple[str, str], Tensor] = {}

    def of(self, tasks: tuple[str, str], block: Block) -> Tensor | None:
        """For all heads of a block ``[heads, size]`` float32; None for the Euclidean metric."""
        if self._config.metric == "euclidean":
            return None
        if block is not self._block:
            self._block, self._fishers, self._scales = block, {}, {}
        if tasks not in self._scales:
            fisher = (self._fisher(tasks[0], block) + self._fisher(tasks[1], block)) / 2
            # where F is 0 no sample has a gradient, but its positions may have some that cancel
            scale = (fisher + damping(fisher, self._config, self._reader.exponent)).rsqrt()
            self._scales[tasks] = torch.where(fisher > 0, scale, torch.zeros_like(scale))
        return self._scales[tasks]

    def _fisher(self, task: str, block: Block) -> Tensor:
        parameter = block.partition.parameter
        if self._reader.source != "full" and parameter not in self._store.gradient_parameters:
            raise NotStoredError(
                f'{self._store.path} holds no F of {parameter}: collect with Fisher(shape="full"), or take '
                'ConflictConfig(metric="euclidean")'
            )
        if task not in self._fishers:
            self._fishers[task] = self._reader.fisher(task, block)
        return self._fishers[task]


def _where(layer: int | None, block: str | None, head: int | None, stack: str | None) -> str:
    """Of which weights a cosine is, in words."""
    parts = [
        "" if stack in (None, "decoder") else stack,
        "" if layer is None else f"L{layer}",
        block or "",
        "" if head is None else f"head {head}",
    ]
    return " ".join(part for part in parts if part) or "all attention weights"
