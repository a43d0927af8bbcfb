"""Options of a collection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch

from fisherscope.errors import UsageError
from fisherscope.instrument.checking.schedule import CHECKS, Check
from fisherscope.instrument.extensions import (
    Extension,
    Fisher,
    SampleGradients,
    resolve_extensions,
)
from fisherscope.instrument.memory import parse_bytes
from fisherscope.instrument.objectives import Objective, Predict
from fisherscope.layout import ModelLayout
from fisherscope.plain import is_one_of, plain_fields

_Kind = TypeVar("_Kind", bound=Extension)

BatchSize = int | Literal["auto"]
ComputeDtype = Literal["float32", "float64", "bfloat16"]
Durability = Literal["power", "process", "none"]


@dataclass(frozen=True)
class CollectOptions:
    """How a collection runs; see :meth:`fisherscope.instrument.scope.Scope.collect`."""

    extensions: Sequence[str | Extension] = ("fisher", "sample_gradients")
    objective: str | Objective | Predict = "auto"
    max_length: int | None = None
    max_samples: int | None = None
    batch_size: BatchSize = "auto"
    memory_budget: int | str | None = None
    compute_dtype: ComputeDtype = "float32"
    store_text: bool = True
    durability: Durability = "power"
    deterministic: bool = False
    resume: bool = True
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    force: bool = False
    check: Check = "auto"
    quiet: bool = False

    def __post_init__(self) -> None:
        plain_fields(self)
        # torch.float32 and "float32" are one option
        object.__setattr__(self, "compute_dtype", str(self.compute_dtype).removeprefix("torch."))
        for name in ("max_length", "max_samples"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name} must be a positive whole number or None, got {value!r}")
        for name in ("rank", "world_size", "seed"):
            value = getattr(self, name)
            if type(value) is not int or not -(2**63) <= value < 2**63:
                raise UsageError(f"{name} must be a whole number of at most 64 bits, got {value!r}")
        for name in ("store_text", "deterministic", "resume", "force", "quiet"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"{name} must be True or False, got {getattr(self, name)!r}")
        is_number = type(self.batch_size) is int and self.batch_size >= 1
        if not is_number and not is_one_of(self.batch_size, ("auto",)):
            raise UsageError(f"batch_size must be a positive number or 'auto', got {self.batch_size!r}")
        if self.memory_budget is not None:
            if self.batch_size != "auto":
                raise UsageError("memory_budget chooses the size of batches: leave batch_size at 'auto'")
            object.__setattr__(self, "memory_budget", parse_bytes(self.memory_budget))
        if not is_one_of(self.compute_dtype, ("float32", "float64", "bfloat16")):
            raise UsageError(
                f"compute_dtype={self.compute_dtype!r}: use 'float32', 'float64' or 'bfloat16'; "
                "float16 cannot hold squared gradients"
            )
        if not is_one_of(self.check, CHECKS):
            raise UsageError(f"check={self.check!r}: use one of {', '.join(map(repr, CHECKS))}")
        if not 0 <= self.rank < self.world_size <= 10_000:
            raise UsageError(
                f"rank={self.rank} of world_size={self.world_size}: ranks are 0 to world_size - 1"
            )
        if self.world_size > 1 and not self.resume:
            raise UsageError("resume=False with several ranks: they join one store, so name a new directory")
        if not is_one_of(self.durability, ("power", "process", "none")):
            raise UsageError(f"durability={self.durability!r}: use 'power', 'process' or 'none'")
        object.__setattr__(self, "extensions", resolve_extensions(self.extensions))

    @property
    def resolved(self) -> tuple[Extension, ...]:
        """The extensions as objects."""
        return resolve_extensions(self.extensions)

    def settled(self, layout: ModelLayout, instrumented: tuple[str, ...]) -> CollectOptions:
        """The same with extensions that know which parameters they take of this model."""
        return replace(self, extensions=tuple(e.settled(layout, instrumented) for e in self.resolved))

    @property
    def fisher(self) -> Fisher | None:
        """Options of the Fisher extension, None where it is not collected."""
        return self.one_of(Fisher)

    @property
    def sample_gradients(self) -> SampleGradients | None:
        """Options of the stored gradients, None where they are not collected."""
        return self.one_of(SampleGradients)

    def one_of(self, kind: type[_Kind]) -> _Kind | None:
        """The extension of that type, None where it is not asked for."""
        return next((e for e in self.resolved if isinstance(e, kind)), None)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute dtype."""
        return {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}[
            self.compute_dtype
        ]

    @property
    def is_random(self) -> bool:
        """Whether gradients depend on the seed: sampled labels, and perhaps objectives of the user's own."""
        sampled = self.fisher is not None and "sampled" in self.fisher.labels
        return sampled or not isinstance(self.objective, str)

    @property
    def sets_batches(self) -> bool:
        """Whether the user says how large batches may be, and not the memory that is free."""
        return self.batch_size != "auto" or self.memory_budget is not None

    def identity(self) -> dict[str, Any]:
        """What of the options identifies a run, as JSON data: batches and ranks do not."""
        return {
            "extensions": {e.name: e.options() for e in self.resolved},
            "max_length": self.max_length,
            "compute_dtype": self.compute_dtype,
            "store_text": self.store_text,
            "deterministic": self.deterministic,
            "seed": self.seed if self.is_random else None,
        }
