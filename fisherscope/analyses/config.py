"""Options of the analyses: one frozen object for all, holding one for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

from fisherscope.errors import UsageError
from fisherscope.plain import odd_field, plain_fields

FLOAT32_TINY = 1.1754943508222875e-38
"""Smallest normal float32: below it a Fisher value is rounding, not information."""


def _fail(owner: object, name: str, problem: str) -> None:
    raise UsageError(f"{type(owner).__name__}.{name}={getattr(owner, name)!r}: {problem}")


def _checked(owner: object) -> None:
    """Numbers of numpy become Python's; what is of another type than its field is refused."""
    plain_fields(owner)
    if (odd := odd_field(owner)) is not None:
        _fail(owner, odd[0], f"must be {odd[1]}")


def _at_least(owner: object, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not value >= minimum:
            _fail(owner, name, f"must be at least {minimum}")


def _one_of(owner: object, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    for item in value if isinstance(value, tuple) else (value,):
        if item not in allowed:
            _fail(owner, name, f"choose from {', '.join(allowed)}")


def _tuples(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, str):
            _fail(owner, name, "give a list, not a single string")
        if value is not None:
            object.__setattr__(owner, name, tuple(value))


@dataclass(frozen=True)
class FisherConfig:
    """Options of `fisher`.

    Attributes:
        confidence: level of both intervals.
        bootstrap: resamples of the samples; 0 leaves the bootstrap out.
        bootstrap_kinds: kinds of groups that get bootstrap intervals (there are very many channels).
        ema_decay: decay of the exponential moving average per sample.
    """

    confidence: float = 0.95
    bootstrap: int = 1000
    bootstrap_kinds: tuple[str, ...] = ("head", "parameter", "block", "layer", "model")
    ema_decay: float = 0.99

    def __post_init__(self) -> None:
        _checked(self)
        _tuples(self, "bootstrap_kinds")
        _at_least(self, 0, "bootstrap")
        _one_of(self, "bootstrap_kinds", ("head", "channel", "parameter", "block", "layer", "model"))
        if not 0 < self.confidence < 1:
            _fail(self, "confidence", "must lie between 0 and 1")
        if not 0 <= self.ema_decay < 1:
            _fail(self, "ema_decay", "must be at least 0 and below 1")


@dataclass(frozen=True)
class ImportanceConfig:
    """Options of `importance`.

    Attributes:
        kinds: what is ranked, each kind on its own.
        top_k: size of the top list that P(in top-k) speaks of.
        bootstrap: resamples of the samples; 0 leaves the probabilities out.
        bootstrap_kinds: kinds that get P(in top-k) and rank intervals.
    """

    kinds: tuple[str, ...] = ("head", "channel")
    top_k: int = 10
    bootstrap: int = 1000
    bootstrap_kinds: tuple[str, ...] = ("head",)

    def __post_init__(self) -> None:
        _checked(self)
        _tuples(self, "kinds", "bootstrap_kinds")
        _one_of(self, "kinds", ("head", "channel"))
        _one_of(self, "bootstrap_kinds", ("head", "channel"))
        _at_least(self, 1, "top_k")
        _at_least(self, 0, "bootstrap")


@dataclass(frozen=True)
class MasksConfig:
    """Options of `masks`.

    Attributes:
        sparsities: shares of units that a mask removes.
        scope: rank over the whole model ("global") or within each layer ("layer").
        kinds: "head" and "channel" are structured; "unstructured" ranks single weights.
    """

    sparsities: tuple[float, ...] = (0.5, 0.7, 0.9)
    scope: Literal["global", "layer"] = "global"
    kinds: tuple[str, ...] = ("head", "channel", "unstructured")

    def __post_init__(self) -> None:
        _checked(self)
        _tuples(self, "sparsities", "kinds")
        _one_of(self, "kinds", ("head", "channel", "unstructured"))
        _one_of(self, "scope", ("global", "layer"))
        if not self.sparsities or not all(0 <= s <= 1 for s in self.sparsities):
            _fail(self, "sparsities", "give one or more shares between 0 and 1")
        object.__setattr__(self, "sparsities", tuple(sorted(set(self.sparsities))))


@dataclass(frozen=True)
class OverlapConfig:
    """Options of `overlap`, which compares the masks of the `masks` analysis.

    Attributes:
        low, high: the bands of the advice, as Jaccard indices.
        alpha: level below which the overlap is called more than chance.
        rank_by: order of the slices that both tasks keep: the smaller of both shares of F, or their product.
        regions: how many of these slices are listed per pair of tasks and sparsity.
    """

    low: float = 0.4
    high: float = 0.7
    alpha: float = 0.05
    rank_by: Literal["min", "product"] = "min"
    regions: int = 50

    def __post_init__(self) -> None:
        _checked(self)
        _one_of(self, "rank_by", ("min", "product"))
        _at_least(self, 1, "regions")
        if not 0 <= self.low <= self.high <= 1:
            _fail(self, "low", f"needs 0 <= low <= high <= 1, high is {self.high!r}")
        if not 0 < self.alpha < 1:
            _fail(self, "alpha", "must lie between 0 and 1")


@dataclass(frozen=True)
class ConflictConfig:
    """Options of `conflict`.

    Attributes:
        metric: cosines of "natural" gradients, h / sqrt(F + lam), or "euclidean" ones, h as it is.
        fisher_pool: whose F whitens: "pooled", the mean of both tasks'; "per_task", each its own;
            "leave_one_out", the pooled F without the sample that is whitened.
        fisher_weighting: what F averages: the contributions h^2 as they are, or those of gradients of "unit"
            norm, so that one outlier does not rule it.
        level: false discovery rate up to which something counts as found.
        correction: "bh", or "by" or "ebh", which hold under any dependence and find less.
        min_effect_size: a pair is reported when its cosine lies at least this far below the mean cosine
            of samples of one task. It filters what is reported, never what is tested.
        margin: mean cosines of tasks are tested against -margin; None takes, for each slice, what different
            clusters of samples of one task do to each other.
        contribution_averaging_window: so many neighbouring samples are averaged before anything is tested,
            for noisy data.
        calibration_splits: random halves of single tasks on which the tests are tried; where they find
            something there too often, q-values are withheld. 0 leaves it out.
        top_pairs: most opposed pairs kept per pair of tasks, beside all that are found.
        position_pairs: most opposed pairs whose positions are looked into, where gradients are stored as
            factors.
        max_samples_per_task: pairs are formed of the first samples of each task; None takes all. Memory and
            time of the tests grow with its square.
        matrix_limit: pairs of samples per pair of tasks up to which all cosines are kept.
        epsilon, ridge, ridge_rel: damping, ``max(epsilon, ridge, ridge_rel * median F of the block)``.
    """

    metric: Literal["natural", "euclidean"] = "natural"
    fisher_pool: Literal["pooled", "per_task", "leave_one_out"] = "pooled"
    fisher_weighting: Literal["contribution", "unit"] = "contribution"
    level: float = 0.05
    correction: Literal["bh", "by", "ebh"] = "bh"
    min_effect_size: float = 0.01
    margin: float | None = None
    contribution_averaging_window: int = 1
    calibration_splits: int = 20
    top_pairs: int = 100
    position_pairs: int = 5
    max_samples_per_task: int | None = 2000
    matrix_limit: int = 4_000_000
    epsilon: float = FLOAT32_TINY
    ridge: float = 0.0
    ridge_rel: float = 1e-6

    def __post_init__(self) -> None:
        _checked(self)
        _one_of(self, "metric", ("natural", "euclidean"))
        _one_of(self, "fisher_pool", ("pooled", "per_task", "leave_one_out"))
        _one_of(self, "fisher_weighting", ("contribution", "unit"))
        _one_of(self, "correction", ("bh", "by", "ebh"))
        _at_least(self, 0, "min_effect_size", "matrix_limit", "ridge", "ridge_rel", "margin")
        _at_least(self, 0, "calibration_splits", "position_pairs")
        _at_least(self, 1, "top_pairs", "max_samples_per_task", "contribution_averaging_window")
        _at_least(self, FLOAT32_TINY, "epsilon")
        if not 0 < self.level < 1:
            _fail(self, "level", "must lie between 0 and 1")


@dataclass(frozen=True)
class InterferenceConfig:
    """Options of `interference`.

    Attributes:
        form: "unsigned", "natural", "signed", "symmetric" or "full": the formulas are in docs/analyses.md.
        aggregate: mean over the entries of a slice (slices of unlike size stay comparable) or their sum. The
            form "full" is neither.
        fisher_pool: whose F divides: the first task's, the second's, or the mean of both. None takes "A" for
            unsigned and natural, "pooled" for the others, which are symmetric only then.
        normalize_gj: scale of the second task's gradients, unsigned and natural only: "none",
            "per_token_mean" (by the attended length) or "per_token_sum" (by the loss-bearing tokens).
        part: slices of the weights or of the biases.
        max_samples_per_task: pairs are formed of the first samples of each task, in task order; F is
            always that of all samples. None takes all.
        include_self: also pair each task with itself (a sample is never paired with itself).
        top_pairs: highest-scoring sample pairs kept per ordered pair of tasks; by absolute value where scores
            have a sign.
        permutations: label permutations of the test of overlap; 0 leaves the test out.
        min_samples_for_fisher: fewer samples than this give a warning.
        epsilon, ridge, ridge_rel: damping, ``max(epsilon, ridge, ridge_rel * median F of the block)``. For
            the form "full", ridge_rel is relative to the mean non-zero eigenvalue of the slice's F. None
            takes 1e-6, and 0.1 for "full".
    """

    form: Literal["unsigned", "natural", "signed", "symmetric", "full"] = "unsigned"
    aggregate: Literal["mean", "sum"] = "mean"
    fisher_pool: Literal["A", "B", "pooled"] | None = None
    normalize_gj: Literal["none", "per_token_mean", "per_token_sum"] = "none"
    part: Literal["weight", "bias"] = "weight"
    max_samples_per_task: int | None = None
    include_self: bool = False
    top_pairs: int = 100
    permutations: int = 999
    min_samples_for_fisher: int = 10
    epsilon: float = FLOAT32_TINY
    ridge: float = 0.0
    ridge_rel: float | None = None

    def __post_init__(self) -> None:
        _checked(self)
        _one_of(self, "form", ("unsigned", "natural", "signed", "symmetric", "full"))
        _one_of(self, "aggregate", ("mean", "sum"))
        if self.fisher_pool is not None:
            _one_of(self, "fisher_pool", ("A", "B", "pooled"))
        _one_of(self, "normalize_gj", ("none", "per_token_mean", "per_token_sum"))
        _one_of(self, "part", ("weight", "bias"))
        _at_least(self, 1, "top_pairs", "max_samples_per_task", "min_samples_for_fisher")
        _at_least(self, 0, "ridge", "ridge_rel", "permutations")
        _at_least(self, FLOAT32_TINY, "epsilon")
        if self.normalize_gj != "none" and not self.one_sided:
            _fail(
                self,
                "normalize_gj",
                f"scales |g_j|, which only the forms unsigned and natural have; the form {self.form!r} takes "
                "h of both samples: leave it at 'none'",
            )

    @property
    def one_sided(self) -> bool:
        """Whether the two samples enter differently: C_i and |g_j|."""
        return self.form in {"unsigned", "natural"}

    @property
    def signed(self) -> bool:
        """Whether scores below 0 mean conflict and above 0 synergy."""
        return self.form in {"signed", "full"}

    @property
    def pool(self) -> Literal["A", "B", "pooled"]:
        """Whose F divides, as applied."""
        return self.fisher_pool or ("A" if self.one_sided else "pooled")

    @property
    def relative_ridge(self) -> float:
        """``ridge_rel`` as applied."""
        return self.ridge_rel if self.ridge_rel is not None else 0.1 if self.form == "full" else 1e-6


@dataclass(frozen=True)
class AnalyzeConfig:
    """Options of a run of analyses.

    Attributes:
        tasks: which tasks, in which order; None takes all of the store.
        seed: of everything random.
        memory_budget: bytes of stored data that an analysis may hold at a time.
        fisher, importance, masks, overlap, conflict, interference: options of each analysis.
        extra: options of analyses registered by users, by name: an instance of their config class, or a
            mapping of its fields.
    """

    tasks: tuple[str, ...] | None = None
    seed: int = 0
    memory_budget: int = 1 << 30
    fisher: FisherConfig = field(default_factory=FisherConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    masks: MasksConfig = field(default_factory=MasksConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    conflict: ConflictConfig = field(default_factory=ConflictConfig)
    interference: InterferenceConfig = field(default_factory=InterferenceConfig)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _checked(self)
        _tuples(self, "tasks")
        if self.tasks is not None and (not self.tasks or len(set(self.tasks)) != len(self.tasks)):
            _fail(self, "tasks", "name one or more tasks, each once")
        _at_least(self, 0, "seed")
        _at_least(self, 1 << 16, "memory_budget")

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars; :meth:`from_dict` reads them back."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` wrote; keys that are absent keep their defaults.

        Raises:
            ValueError: a key is unknown, or a value is not valid.
        """
        parts = {f.name: f.default_factory for f in dataclasses.fields(cls) if f.name in PARTS}
        values = dict(data)
        for name, part in parts.items():
            if name in values and not dataclasses.is_dataclass(values[name]):
                values[name] = build(part, values[name])  # type: ignore[arg-type]
        return build(cls, values)


T = TypeVar("T")
PARTS = ("fisher", "importance", "masks", "overlap", "conflict", "interference")


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make an option object of a mapping.

    Raises:
        ValueError: a key is unknown, or a value is not valid.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"options of {cls.__name__} are a mapping of names to values, not {values!r}")
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if unknown := [key for key in values if key not in known]:
        raise UsageError(f"{cls.__name__} has no option {unknown[0]!r}: it has {', '.join(known)}")
    return cls(**values)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
