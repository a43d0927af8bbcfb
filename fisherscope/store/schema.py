"""``store.json``: what a store is a store of. Written once, when the store is created."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from fisherscope.errors import CorruptStoreError, FingerprintError, StoreFormatError
from fisherscope.layout import GroupTable, ModelLayout
from fisherscope.linalg.normalization import NORMALIZATIONS
from fisherscope.store import disk
from fisherscope.store.dtypes import gradient_dtype
from fisherscope.store.encodings import FEATURES, WIDE_SQUARES, Encodings
from fisherscope.store.fields import leaves
from fisherscope.store.gradient_plan import GradientPlan
from fisherscope.store.position_plan import PositionPlan

FORMAT = "fisherscope-store"
FORMAT_VERSION = 1
HEADER_FILE = "store.json"
JOURNAL_DIRECTORY = "journal"
SHARD_DIRECTORY = "shards"
MAX_HEADER_BYTES = 64 << 20
MAX_PIECES = 1 << 25
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline

FISHER_SHAPES = ("full", "groups")
SQUARES = ("plain", "wide")


@dataclass(frozen=True)
class StoreHeader:
    """What every shard of a store has in common.

    Attributes:
        fingerprint: identity of the run (digests of weights, tokenizer, objective, batch plan, ...): two
            runs may write to one store only if they agree on it.
        layout: every parameter of the model, every head slice, every MLP channel.
        parameters: the instrumented parameters.
        gradient_parameters: those whose per-sample gradients are stored; may be empty.
        gradient_dtype: element type of stored gradients that are dense.
        encodings: how the gradients of each parameter are kept. Settled when the store is created and no part
            of its identity: a resumed run goes on with them.
        normalization: how h_i comes from g_i: "per_token" g / sqrt(T), "none" g, "mean" g / T.
        fisher_shape: "full" where snapshots hold F and mean h of every parameter, else "groups".
        squares: "wide" where squares of any float32 gradient are held: group values as norms, and sums in
            snapshots in units of powers of two. "plain", as in the first stores: what float32 holds of them.
        position_parameters: matrices with stored contributions of single positions; may be empty.
        state: keys of the fingerprint, with dots between levels, whose values the run itself changes, such as
            a counter in a loss of the user's own: they are compared with nothing. "a.*" stands for what comes
            to be, or goes, below "a".
        options: of the collection, as used.
        provenance: versions, model name, command line: for readers, no part of the identity.
    """

    fingerprint: dict[str, Any]
    layout: ModelLayout
    parameters: tuple[str, ...]
    gradient_parameters: tuple[str, ...] = ()
    gradient_dtype: str = "bfloat16"
    encodings: Encodings = field(default_factory=Encodings)
    normalization: str = "per_token"
    fisher_shape: str = "full"
    position_parameters: tuple[str, ...] = ()
    squares: str = "plain"
    state: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        gradient_dtype(self.gradient_dtype)
        for text in leaves(
            [self.fingerprint, list(self.state), self.options, self.provenance, self.layout.to_json()]
        ):
            if isinstance(text, str) and _CONTROL.search(text):
                raise ValueError(f"{text!r} has control characters, which a terminal would obey")
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization {self.normalization!r} is none of {list(NORMALIZATIONS)}")
        if self.fisher_shape not in FISHER_SHAPES:
            raise ValueError(f"fisher_shape {self.fisher_shape!r} is none of {list(FISHER_SHAPES)}")
        if self.squares not in SQUARES:
            raise ValueError(f"squares {self.squares!r} is none of {list(SQUARES)}")
        known = {info.name for info in self.layout.parameters}
        chosen = (self.parameters, self.gradient_parameters, self.position_parameters)
        for name in chain.from_iterable(chosen):
            if name not in known:
                raise ValueError(f"the layout has no parameter {name!r}")
        for names in chosen:
            if len(set(names)) != len(names):
                raise ValueError(f"a parameter is named twice in {list(names)}")
        _ = self.positions
        self.encodings.check(self.layout, self.gradient_parameters)

    @cached_property
    def groups(self) -> GroupTable:
        """The groups of the instrumented parameters, in the order of ``groups/*`` datasets."""
        return GroupTable.build(self.layout, self.parameters)

    @cached_property
    def positions(self) -> PositionPlan:
        """Where contributions of single positions lie."""
        return PositionPlan.build(self.layout, self.position_parameters)

    @cached_property
    def gradients(self) -> GradientPlan:
        """Where stored gradients lie."""
        return GradientPlan.build(self.layout, self.gradient_parameters, self.encodings)

    @property
    def gradients_in_words(self) -> str:
        """Of how many parameters gradients are stored, and how; "none"."""
        return self.encodings.in_words(self.gradient_dtype, self.gradient_parameters)

    @property
    def gradient_encodings(self) -> dict[str, str]:
        """The encoding of every parameter whose gradients are stored."""
        return {name: self.encodings.encoding(name) for name in self.gradient_parameters}

    @property
    def gradient_rank(self) -> int | None:
        """Outer products per sample of "lowrank" gradients; None where there are none."""
        return self.encodings.rank

    @property
    def requires(self) -> list[str]:
        """Features that a reader of the store must know."""
        used = self.encodings.features(self.gradient_dtype, self.gradient_parameters)
        return sorted([*used, WIDE_SQUARES]) if self.squares == "wide" else used

    def to_json(self) -> dict[str, Any]:
        """Plain data; :meth:`from_json` reads it back."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "requires": self.requires,
            "fingerprint": self.fingerprint,
            "layout": self.layout.to_json(),
            "parameters": list(self.parameters),
            "gradient_parameters": list(self.gradient_parameters),
            "gradient_dtype": self.gradient_dtype,
            **self.encodings.to_json(),
            "normalization": self.normalization,
            "fisher_shape": self.fisher_shape,
            "position_parameters": list(self.position_parameters),
            "squares": self.squares,
            "state": list(self.state),
            "options": self.options,
            "provenance": self.provenance,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StoreHeader:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: a field is missing or has the wrong form.
        """
        data = {**_ABSENT, **data}
        for key, kind in _FIELDS.items():
            if not isinstance(data.get(key), kind):
                raise ValueError(f"{key!r} is missing or no {kind.__name__}")  # noqa: TRY004 - damage, not misuse
        for key in ("parameters", "gradient_parameters", "position_parameters", "requires", "state"):
            if not all(isinstance(name, str) for name in data[key]):
                raise ValueError(f"{key!r} holds something else than names")
        if _pieces(data["layout"]) > MAX_PIECES:
            raise ValueError(f"the layout declares more than {MAX_PIECES} heads and channels")
        header = cls(
            fingerprint=data["fingerprint"],
            layout=ModelLayout.from_json(data["layout"]),
            parameters=tuple(data["parameters"]),
            gradient_parameters=tuple(data["gradient_parameters"]),
            gradient_dtype=data["gradient_dtype"],
            encodings=Encodings.from_json(data),
            normalization=data["normalization"],
            fisher_shape=data["fisher_shape"],
            position_parameters=tuple(data["position_parameters"]),
            squares=data["squares"],
            state=tuple(data["state"]),
            options=data["options"],
            provenance=data["provenance"],
        )
        if undeclared := set(header.requires) - set(data["requires"]):
            raise ValueError(f"it uses {sorted(undeclared)} and does not say so")
        return header


def _pieces(data: Any) -> int:
    """Pieces of the partitions in a layout that are written as a count: a few bytes can declare millions."""
    if isinstance(data, dict):
        count = data.get("count")
        return (count if type(count) is int else 0) + sum(map(_pieces, data.values()))
    return sum(map(_pieces, data)) if isinstance(data, list) else 0


_FIELDS: dict[str, type] = {
    "requires": list,
    "fingerprint": dict,
    "layout": dict,
    "parameters": list,
    "gradient_parameters": list,
    "gradient_dtype": str,
    "normalization": str,
    "fisher_shape": str,
    "position_parameters": list,
    "squares": str,
    "state": list,
    "options": dict,
    "provenance": dict,
}
# what a key that may be absent then stands for
_ABSENT: dict[str, Any] = {"position_parameters": [], "requires": [], "squares": "plain", "state": []}


def encode_header(header: StoreHeader) -> bytes:
    """The bytes of ``store.json``.

    Raises:
        TypeError: fingerprint, options or provenance hold something that JSON cannot.
        ValueError: they hold NaN or infinity.
    """
    return (json.dumps(header.to_json(), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read_header(root: Path) -> tuple[StoreHeader, str]:
    """Read and check ``store.json``.

    Returns:
        The header, and the sha256 of the file in hex.

    Raises:
        StoreFormatError: the directory is not a store, or one of another format version.
        CorruptStoreError: ``store.json`` is damaged.
    """
    path = root / HEADER_FILE
    try:
        content = disk.read_inside(root, HEADER_FILE, limit=MAX_HEADER_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreFormatError(
            f"{root} is not a fisherscope store: it {_what_is_there(root)}. A store is the directory that "
            "collect() wrote"
        ) from None
    try:
        data = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{path} is not valid JSON ({error}): restore it from a copy") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise StoreFormatError(f"{path} does not describe a fisherscope store")
    if data.get("format_version") != FORMAT_VERSION:
        raise StoreFormatError(
            f"{root} has format version {data.get('format_version')!r}, this fisherscope reads and writes "
            f"version {FORMAT_VERSION}: use the fisherscope that wrote it, or collect again"
        )
    _refuse_unknown_features(root, data.get("requires", []))
    try:
        header = StoreHeader.from_json(data)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CorruptStoreError(f"{path} is damaged: {error}. Restore it from a copy") from error
    return header, hashlib.sha256(content).hexdigest()


def _what_is_there(root: Path) -> str:
    """What a path is that is no store, as the rest of a sentence."""
    if root.is_symlink() and not root.exists():
        return f"is a link to {root.readlink()}, which does not exist"
    if not root.exists():
        return "does not exist (was it moved or deleted?)"
    return "has no store.json" if root.is_dir() else "is a file"


def _refuse_unknown_features(root: Path, required: Any) -> None:
    """A store may need what only a later fisherscope knows.

    Raises:
        StoreFormatError: this one does.
    """
    if not isinstance(required, list):
        return  # damage, which reading the header names
    unknown = sorted(
        {str(feature)[:80] for feature in required if not isinstance(feature, str) or feature not in FEATURES}
    )
    if unknown:
        raise StoreFormatError(
            f"{root} uses {', '.join(map(ascii, unknown))}, which this fisherscope does not know (it knows "
            f"{sorted(FEATURES)}): read it with the fisherscope that wrote it or a later one"
        )


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def check_identity(old: StoreHeader, new: StoreHeader, root: Path) -> None:
    """Check that a run may add to a store.

    Raises:
        FingerprintError: fingerprints or what is stored differ; the message names every key that does.
    """
    state = {*old.state, *new.state}
    if changes := differences(_identity(old), _identity(new), state):
        raise FingerprintError(
            f"{root} was written by another run. It differs in\n  "
            + "\n  ".join(changes)
            + "\nUse the same model, data and options to resume it, or collect into another directory"
        )


def differences(before: Mapping[str, Any], after: Mapping[str, Any], state: Iterable[str] = ()) -> list[str]:
    """What is another value now, in words, but for the keys that are state."""
    state = set(state)
    growing = tuple(key.removesuffix("*") for key in state if key.endswith(".*"))
    return [
        f"{key}: {_short(before.get(key, '<absent>'))} in the store, {_short(after.get(key, '<absent>'))} now"
        for key in sorted((before.keys() | after.keys()) - state)
        if before.get(key) != after.get(key)
        and not (growing and key.startswith(growing) and (key not in before or key not in after))
    ]


def _identity(header: StoreHeader) -> dict[str, Any]:
    data = json.loads(json.dumps(header.to_json(), allow_nan=False))
    flat = dict(_flatten("", data["fingerprint"]))
    for key in (
        "layout",
        "parameters",
        "gradient_parameters",
        "gradient_dtype",
        "normalization",
        "fisher_shape",
        "position_parameters",
        "squares",
    ):
        # the header's own fields are compared too: they decide the shapes of the datasets
        flat.setdefault(f"header.{key}", data[key])
    return flat


def _flatten(prefix: str, data: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flatten(f"{prefix}{key}.", value)
        else:
            yield prefix + key, value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
