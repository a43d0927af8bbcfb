"""A first-order extension of BackPACK as a quantity of a collection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from backpack.extensions import BatchGrad, BatchL2Grad, SumGradSquared, Variance
from backpack.extensions.firstorder.base import FirstOrderBackpropExtension
from torch import Tensor
from typing_extensions import override

from fisherscope.errors import FisherscopeError, UsageError
from fisherscope.instrument.backpack.surrogate import run_on_gradients
from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions import Collector, Extension
from fisherscope.instrument.extensions.base import Context
from fisherscope.linalg import RunningSum
from fisherscope.store import ContributionStore, SegmentWriter

Reduction = Literal["sum", "samples", "variance"]

_REDUCTIONS: dict[type[FirstOrderBackpropExtension], Reduction] = {
    BatchGrad: "samples",
    BatchL2Grad: "samples",
    SumGradSquared: "sum",
    Variance: "variance",
}


@dataclass(frozen=True)
class FromBackpack(Extension):
    """A first-order extension of BackPACK, collected like any other quantity.

    It is run on the signed gradients g_i of the samples' *summed* losses, parameter by parameter and batch
    by batch, and sees each parameter as the vector of its entries: as the weight of an ``nn.Linear`` with one
    input feature. :meth:`result` gives what is kept: the quantity of the whole task, however it was batched.

    Attributes:
        extension: an instance, such as ``SumGradSquared()`` or one of your own.
        reduction: how the results of batches become one. "sum": they are sums over samples, and are added.
            "samples": their first axis is that of the samples, and they are added over it. "variance": they
            are population variances over the samples. None where the extension is one of BackPACK's four.
    """

    name: ClassVar[str] = "backpack"
    extension: FirstOrderBackpropExtension
    reduction: Reduction | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.extension, FirstOrderBackpropExtension):
            raise TypeError(
                f"FromBackpack({self.extension!r}): give an instance of a first-order extension of BackPACK, "
                "such as SumGradSquared()"
            )
        kind = type(self.extension).__name__
        if self.extension.get_subsampling() is not None:
            raise UsageError(
                f"FromBackpack({kind}(subsampling=...)): places in a batch mean nothing in a collection; use "
                "max_samples"
            )
        reduction = self.reduction or _REDUCTIONS.get(type(self.extension))
        if reduction not in {"sum", "samples", "variance"}:
            raise UsageError(
                f"FromBackpack({kind}(), reduction={self.reduction!r}): say how results of batches become "
                "one, 'sum', 'samples' or 'variance'"
            )
        object.__setattr__(self, "reduction", reduction)
        # several may be collected together: the name of each is that of what it saves
        object.__setattr__(self, "name", f"backpack/{self.extension.savefield}")

    @override
    def options(self) -> dict[str, Any]:
        kind = type(self.extension)
        return {"extension": f"{kind.__module__}.{kind.__qualname__}", "reduction": self.reduction}

    @override
    def collector(self, context: Context) -> Collector:
        return _Sums(self, context)

    def result(self, store: ContributionStore, task: str, parameter: str) -> Tensor:
        """The quantity of one parameter over all samples of a task.

        Returns:
            float64: what BackPACK gives with all samples in one batch; with "samples" the sum of that over
            the samples. So ``[*shape]`` for ``SumGradSquared`` (sum of g ** 2), ``Variance`` (population
            variance of g) and ``BatchGrad`` (sum of g), and ``[1]`` for ``BatchL2Grad`` (sum of squared
            norms).

        Raises:
            NotStoredError: it was not collected.
        """
        if self.reduction != "variance":
            return store.aggregate(task, f"{self.name}/{parameter}")
        count = store.aggregate(task, "moments/count")
        square = store.aggregate(task, f"{self.name}/square/{parameter}") / count
        mean = store.aggregate(task, f"{self.name}/total/{parameter}") / count
        return (square - mean.square()).clamp_min(0)


class _Sums(Collector):
    """Sums over samples, by the name of what is stored: nothing per sample is kept."""

    def __init__(self, options: FromBackpack, context: Context) -> None:
        self._options = options
        self._names = [
            f"{options.name}/{part}{parameter}"
            for parameter in context.parameters
            for part in (("square/", "total/") if options.reduction == "variance" else ("",))
        ]
        self._sums: dict[str, RunningSum] = {}

    @override
    def wants_dense(self, parameter: str) -> bool:
        return True

    @override
    def update(self, emission: Emission, segment: SegmentWriter | None, start: int) -> None:
        del segment, start
        gradients, parameter = emission.dense, emission.parameter
        value = run_on_gradients(self._options.extension, gradients, emission.theta.float())
        if self._options.reduction == "variance":
            # variances of batches do not add up; sums of squares do
            n, mean = len(gradients), gradients.mean(0)
            self._add(f"square/{parameter}", n * (self._of_shape(value, mean.shape) + mean.square()))
            self._add(f"total/{parameter}", n * mean)
        elif self._options.reduction == "samples":
            self._add(parameter, self._of_samples(value, len(gradients)).sum(0))
        else:
            self._add(parameter, value)

    def _of_samples(self, value: Tensor, n: int) -> Tensor:
        if value.dim() == 0 or len(value) != n:
            raise FisherscopeError(self._wrong(value, f"a first axis of {n} samples"))
        return value

    def _of_shape(self, value: Tensor, shape: torch.Size) -> Tensor:
        if value.shape != shape:
            raise FisherscopeError(self._wrong(value, f"the parameter's shape {tuple(shape)}"))
        return value

    def _wrong(self, value: Tensor, expected: str) -> str:
        return (
            f"{type(self._options.extension).__name__} saved {self._options.extension.savefield!r} of shape "
            f"{tuple(value.shape)} and not with {expected}: give FromBackpack another reduction"
        )

    def _add(self, name: str, value: Tensor) -> None:
        full, value = f"{self._options.name}/{name}", value.reshape(value.shape or (1,))
        held = self._sums.get(full)
        if held is None:
            held = self._sums[full] = RunningSum.zeros(*value.shape, device=value.device)
        if held.value.shape != value.shape:
            raise FisherscopeError(
                self._wrong(value, f"the shape {tuple(held.value.shape)} of another batch")
            )
        held.add(value.to(held.value.device, torch.float32, copy=True))

    @override
    def state(self) -> dict[str, Tensor]:
        arrays: dict[str, Tensor] = {}
        for name, held in self._sums.items():
            arrays |= held.arrays(name)
        return arrays

    @override
    def load_state(self, arrays: Mapping[str, Tensor]) -> None:
        self._sums = {}
        for name in self._names:
            if name in arrays:
                self._sums[name] = RunningSum.zeros(*arrays[name].shape, device=torch.device("cpu"))
                self._sums[name].load(arrays, name, 0)
