"""How the gradients of each parameter are kept: as they are, as factors, or cut to a low rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fisherscope.errors import UsageError
from fisherscope.layout import ModelLayout
from fisherscope.store.dtypes import gradient_dtype
from fisherscope.store.position_plan import side_of
from fisherscope.words import counted

Encoding = Literal["dense", "factored", "lowrank"]

ENCODINGS: tuple[Encoding, ...] = ("dense", "factored", "lowrank")
MAX_RANK = 1 << 16

# what a reader must know to read a store, beside format version 1
ROW_SCALE = "float16-row-scale"
WIDE_SQUARES = "wide-squares"
FEATURES = frozenset({"factored", "lowrank", ROW_SCALE, WIDE_SQUARES})


@dataclass(frozen=True)
class Encodings:
    """The encoding of every stored gradient.

    "dense" keeps the gradient itself. "factored" keeps, position by position, what the layer was given and
    the gradient of what it gave, whose outer products add up to the gradient. "lowrank" keeps the first
    singular vectors of each sample's gradient, and how far they are from it.

    Attributes:
        of: per parameter "factored" or "lowrank"; what is absent is "dense".
        inputs: per factored parameter the one under whose name its layer's input lies: Q, K and V are given
            the same.
        transposed: factored parameters whose first axis runs over input features (transformers' ``Conv1D``).
        rank: outer products per sample of every "lowrank" parameter.
        dtype: element type of factors and singular vectors; that of dense gradients is the header's.
    """

    of: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    rank: int | None = None
    dtype: str = "bfloat16"

    def encoding(self, parameter: str) -> str:
        """Of one parameter whose gradients are stored."""
        return self.of.get(parameter, "dense")

    def named(self, encoding: Encoding) -> tuple[str, ...]:
        """The parameters of that encoding other than "dense", in order."""
        return tuple(name for name, kind in self.of.items() if kind == encoding)

    def output_axis(self, parameter: str) -> int:
        """The axis of a factored parameter that runs over output features."""
        return 1 if parameter in self.transposed else 0

    def in_words(self, dense_dtype: str, gradient_parameters: Collection[str]) -> str:
        """How gradients are stored: ``96 parameters as float32 factors, 24 in bfloat16``; ``none``."""
        how = {
            "factored": f"as {self.dtype} factors",
            "lowrank": f"as {self.dtype} factors of rank {self.rank}",
            "dense": f"in {dense_dtype}",
        }
        number = Counter(map(self.encoding, gradient_parameters))
        first, *others = [kind for kind in how if number[kind]] or [""]
        if not first:
            return "none"
        words = [f"{counted(number[first], 'parameter')} {how[first]}"]
        return ", ".join([*words, *(f"{number[kind]:,} {how[kind]}" for kind in others)])

    def features(self, dense_dtype: str, gradient_parameters: Collection[str]) -> list[str]:
        """What a reader must know, sorted."""
        used = set(self.of.values()) - {"dense"}
        has_dense = any(self.encoding(name) == "dense" for name in gradient_parameters)
        if (used and self.dtype == "float16") or (has_dense and dense_dtype == "float16"):
            used.add(ROW_SCALE)
        return sorted(used)

    def check(self, layout: ModelLayout, gradient_parameters: Collection[str]) -> None:
        """Check that these encodings can be those of these parameters.

        Raises:
            ValueError: they cannot; the message names the parameter.
        """
        gradient_dtype(self.dtype)
        stored = set(gradient_parameters)
        for name, kind in self.of.items():
            if kind not in ENCODINGS or name not in stored:
                raise UsageError(f"{name!r} is no stored gradient that can be {kind!r}")
            if kind != "dense" and len(layout.parameter(name).shape) != 2:
                raise UsageError(f"{name!r} is no matrix: its gradients cannot be {kind!r}")
        factored = set(self.named("factored"))
        if self.inputs.keys() != factored or not factored.issuperset(self.transposed):
            raise UsageError("the inputs of factored gradients are not those of the factored parameters")
        for name, shared in self.inputs.items():
            if self.inputs.get(shared) != shared:
                raise UsageError(f"the input of {name!r} lies under {shared!r}, which has none of its own")
            if self._input_of(layout, name) != self._input_of(layout, shared):
                raise UsageError(f"{name!r} and {shared!r} cannot have the same input")
        has_rank = type(self.rank) is int and 1 <= self.rank <= MAX_RANK
        if not has_rank and (self.rank is not None or self.named("lowrank")):
            raise UsageError(f"{self.rank!r} is no rank from 1 to {MAX_RANK}")

    def _input_of(self, layout: ModelLayout, parameter: str) -> tuple[str, int]:
        """Whose positions its layer sees, and how many features it is given."""
        side = side_of(layout, parameter)
        if side is None:
            raise UsageError(f"it is not known whose positions the layer of {parameter!r} sees")
        return side, layout.parameter(parameter).shape[1 - self.output_axis(parameter)]

    def to_json(self) -> dict[str, Any]:
        """Keys of ``store.json``; :meth:`from_json` reads them back."""
        return {
            "gradient_encodings": dict(self.of),
            "gradient_inputs": dict(self.inputs),
            "gradient_transposed": list(self.transposed),
            "gradient_rank": self.rank,
            "factor_dtype": self.dtype,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Encodings:
        """Read what :meth:`to_json` wrote; a key that is absent stands for dense gradients.

        Raises:
            ValueError: a key has the wrong form.
        """
        of, inputs = data.get("gradient_encodings", {}), data.get("gradient_inputs", {})
        transposed = data.get("gradient_transposed", [])
        if not isinstance(of, dict) or not isinstance(inputs, dict) or not isinstance(transposed, list):
            raise UsageError("the encodings of gradients have another form than expected")
        if not all(isinstance(name, str) for name in [*of.values(), *inputs.values(), *transposed]):
            raise UsageError("the encodings of gradients hold something else than names")
        dtype = data.get("factor_dtype", "bfloat16")
        return cls(dict(of), dict(inputs), tuple(transposed), data.get("gradient_rank"), dtype)
