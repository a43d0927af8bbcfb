"""Kronecker factors of linear maps, as they are read from a store."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fisherscope.errors import CorruptStoreError, NotStoredError
from fisherscope.layout import HeadBlock
from fisherscope.linalg.scaling import as_float32
from fisherscope.store import aggregates, lookup
from fisherscope.store.index import TaskIndex
from fisherscope.store.opened import OpenStore
from fisherscope.words import counted


@dataclass(frozen=True)
class KroneckerFactors:
    """The Fisher of one linear map, ``y = W a + b``, as a Kronecker product.

    With a_t the input and d_t the gradient of the sample's summed loss with respect to the output at
    position t, over all N samples i with their T_i loss-bearing tokens::

        A = mean over attended positions of all samples of a_t a_t'      (with a 1 behind a_t for the bias)
        S = mean over samples of (1 / T_i) sum_t d_t d_t'

    Then ``A (x) S`` stands for E[h h'], where h = vec(g) / sqrt(T_i) is g = [dL/dW, dL/db], which is
    ``[out, in (+ 1)]``, column by column. Row by row, as ``nn.Linear`` lays it out, that is
    ``torch.kron(S, A)``. For a single sample with a single position it is exact. This is K-FAC (Martens &
    Grosse 2015) in the "expand" convention of Eschenhagen et al. (2023), in which every position is a term of
    its own, under the data's labels.

    Where a map is used several times, each use of a position is a term of its own in both sums, and A is the
    mean over all of them.

    Attributes:
        module: path of the map.
        A: ``[in, in]`` float32, or ``[in + 1, in + 1]`` with the bias; float64 where float32 cannot hold a
            value.
        S: ``[out, out]``, likewise.
        with_bias: whether the last row and column of ``A`` are those of the bias.
        samples: N, samples that the means cover; they may lag behind, as those of the Fisher do.
        positions: number of terms in the mean that is A.
        blocks: the blocks of heads that the map's weight holds: Q, K and V together where they are fused.
    """

    module: str
    A: Tensor
    S: Tensor
    with_bias: bool
    samples: int
    positions: int
    blocks: tuple[HeadBlock, ...] = ()

    def head(self, block: str, head: int) -> KroneckerFactors:
        """The factors of one head's slice: a query head for Q and O, a kv head for K and V.

        For O the head is a part of the input and ``A`` is cut, without the bias, which belongs to no head.
        For all others it is a part of the output: ``S`` is cut, and a bias stays with its head.

        Args:
            block: name of a block, such as "Q".
            head: number of the head.

        Raises:
            KeyError: the map holds no such block.
            IndexError: no such head.
        """
        found = next((b for b in self.blocks if b.name == block), None)
        if found is None:
            known = [b.name for b in self.blocks]
            raise KeyError(f"{self.module!r} holds no heads of block {block!r}: it has {known}")
        if not 0 <= head < found.heads:
            raise IndexError(
                f"{block} of {self.module!r} has {counted(found.heads, 'head')}, asked for {head}"
            )
        start = found.weight.starts[head]
        cut = slice(start, start + found.weight.width)
        if found.role == "O":
            return replace(self, A=self.A[cut, cut], with_bias=False, blocks=())
        return replace(self, S=self.S[cut, cut], blocks=())


def read_factors(store: OpenStore, index: TaskIndex, module: str) -> KroneckerFactors:
    """The factors of one linear map, merged over ranks.

    Raises:
        KeyError: the model has no such module with a weight.
        NotStoredError: its weight was not instrumented, or its factors were not collected.
        CorruptStoreError: what is stored does not fit the weight.
    """
    parameter = lookup.instrumented(store.header, f"{module}.weight" if module else "weight")
    sums = {part: aggregates.total(store, index, f"kronecker/{part}/{module}") for part in ("A", "S")}
    positions = int(aggregates.total(store, index, f"kronecker/positions/{module}").sum())
    samples = sum(snapshot.count for snapshot in index.snapshots)
    if not samples or not positions:
        raise NotStoredError(f"the snapshots of task {index.task.name!r} cover no samples: resume the run")
    with_bias = parameter.removesuffix("weight") + "bias" in store.parameters
    shape = store.layout.parameter(parameter).shape
    found = (len(sums["S"]), len(sums["A"]) - with_bias)
    if found not in {shape, shape[::-1]} or any(s.shape != (len(s), len(s)) for s in sums.values()):
        shapes = {part: tuple(values.shape) for part, values in sums.items()}
        raise CorruptStoreError(f"{store.path}: the factors of {module!r} of shape {shape} are {shapes}")
    return KroneckerFactors(
        module=module,
        A=as_float32(sums["A"] / positions),
        S=as_float32(sums["S"] / samples),
        with_bias=with_bias,
        samples=samples,
        positions=positions,
        blocks=tuple(b for _, b in store.layout.head_blocks() if b.weight.parameter == parameter),
    )
