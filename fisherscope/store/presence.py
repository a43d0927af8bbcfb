"""Whether the gradients of some samples were stored at all."""

from __future__ import annotations

from fisherscope.errors import NotStoredError
from fisherscope.store.factor_plan import FactoredPlace, LowRankPlace
from fisherscope.store.gradient_plan import Place, WholeDataset
from fisherscope.store.index import Chunk
from fisherscope.store.opened import OpenStore


def is_stored(store: OpenStore, chunk: Chunk, place: Place) -> bool:
    """Whether the gradients of a chunk's samples are there."""
    if isinstance(place, FactoredPlace | LowRankPlace):
        name = place.left.name
    else:
        name = place.name if isinstance(place, WholeDataset) else place[0][0].name
    return name in store.shard(chunk.segment.shard)


def require(store: OpenStore, chunk: Chunk, place: Place) -> None:
    """Raise if the gradients of a chunk's samples were left out.

    Raises:
        NotStoredError: they were.
    """
    segment = chunk.segment
    if not is_stored(store, chunk, place):
        sample = f"{segment.task}_{segment.rows[int(chunk.positions[0])]}"
        raise NotStoredError(
            f"the gradients of sample {sample} were not stored: collect again with "
            f"SampleGradients(max_samples=None), ask for fewer samples, or compute them again with "
            f"scope.gradients(store, [{sample!r}])"
        )
