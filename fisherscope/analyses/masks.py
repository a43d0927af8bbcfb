"""What to keep of a model at a stated sparsity."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from fisherscope.analyses.config import MasksConfig
from fisherscope.analyses.context import Context
from fisherscope.analyses.quantities import missing
from fisherscope.analyses.registry import register
from fisherscope.analyses.result import Result
from fisherscope.analyses.selection import keep_count, keep_top
from fisherscope.analyses.units import layer_name
from fisherscope.analyses.unstructured import UnstructuredMasks, unstructured_masks
from fisherscope.errors import NotStoredError
from fisherscope.store import ContributionStore
from fisherscope.words import counted, level, several

WORDS = {"head": "head slices", "channel": "channels", "unstructured": "single weights"}
_NOUNS = {kind: (words.removesuffix("s"), words) for kind, words in WORDS.items()}
_PLACE = ["stack", "layer", "block", "index", "parameter", "size"]
_COLUMNS = ["task", "kind", "sparsity", "level", "stack", "layer", "units", "kept", "achieved"]


@dataclass(frozen=True)
class StructuredMasks:
    """Which groups of one kind stay.

    Attributes:
        units: one row per group: stack, layer, block, index, parameter, size.
        scores: mean F of each group, per task.
        keep: bool ``[units]`` per task and sparsity.
    """

    units: pd.DataFrame
    scores: dict[str, NDArray[np.float64]]
    keep: dict[tuple[str, float], NDArray[np.bool_]]


@dataclass(kw_only=True, eq=False, repr=False)
class MasksResult(Result):
    """Masks per task, kind and sparsity.

    ``frame``: units and kept units per task, kind, sparsity and layer (``level`` "layer"), and over the model
    (``level`` "all", layer -1); ``achieved`` is the share removed. ``extra["heads"]`` lists every head slice
    with its score and one column ``keep_<sparsity>`` per sparsity; ``extra["parameters"]`` counts single
    weights per parameter.

    A structured unit of kind "head" is one slice (layer, block, head) of a weight: the Q, K, V and O slices
    of a head are ranked each for itself, K and V by kv head. Removing a whole head is removing its slices.
    """

    structured: dict[str, StructuredMasks] = field(default_factory=dict)
    unstructured: UnstructuredMasks | None = None

    def units(self, task: str, sparsity: float, kind: str = "head") -> pd.DataFrame:
        """Every group of a kind: stack, layer, block, index, parameter, size, score, keep.

        Raises:
            KeyError: no such task, sparsity or kind.
        """
        if kind not in self.structured:
            raise KeyError(f"no structured masks of kind {kind!r}: there are {list(self.structured)}")
        masks = self.structured[kind]
        if (task, sparsity) not in masks.keep:
            raise KeyError(f"no mask for task {task!r} at sparsity {sparsity}: there are {list(masks.keep)}")
        return masks.units.assign(score=masks.scores[task], keep=masks.keep[task, sparsity])

    def heads(self, task: str, sparsity: float) -> pd.DataFrame:
        """Head slices with coordinates (stack, layer, block, head), score, and whether each stays."""
        return self.units(task, sparsity, "head").rename(columns={"index": "head"})

    def channels(self, task: str, sparsity: float) -> pd.DataFrame:
        """MLP channels with coordinates (stack, layer, channel), score, and whether each stays."""
        return self.units(task, sparsity, "channel").rename(columns={"index": "channel"})

    def mask(self, task: str, sparsity: float, parameter: str) -> Tensor:
        """Unstructured mask of one weight: bool ``[*shape]``, True where it stays.

        Raises:
            NotStoredError: the store holds no F in full shape.
            KeyError: no such task, sparsity or ranked parameter.
        """
        if self.unstructured is None:
            raise NotStoredError(f"no unstructured masks: {self.details['unstructured']}")
        return self.unstructured.mask(task, sparsity, parameter)

    @override
    def top(self, k: int = 10) -> pd.DataFrame:
        """The layers that a mask strips most bare."""
        rows = self.frame[self.frame["level"] == "layer"]
        return rows.sort_values("achieved", ascending=False, kind="stable").head(k).reset_index(drop=True)

    @override
    def summary(self) -> str:
        lines = []
        for (task, kind), rows in self.frame.groupby(["task", "kind"], sort=False):
            sparsity = rows["sparsity"].max()
            rows = rows[rows["sparsity"] == sparsity]  # noqa: PLW2901
            whole, layers = rows[rows["level"] == "all"].iloc[0], rows[rows["level"] == "layer"]
            layers = layers.sort_values("achieved", kind="stable")
            least, most = layers.iloc[0], layers.iloc[-1]
            what = counted(int(whole["units"]), *_NOUNS[str(kind)])
            stay = several(int(whole["units"]), "stays", "stay")
            line = f"{task}: at {level(sparsity)} sparsity {whole['kept']:,} of {what} {stay}"
            if len(layers) == 1:
                lines.append(f"{line}.")
            elif f"{most['achieved']:.0%}" == f"{least['achieved']:.0%}":
                lines.append(f"{line}, the same share in every layer.")
            else:
                line += f"; most is removed in {layer_name(most)} ({most['achieved']:.0%})"
                lines.append(f"{line}, least in {layer_name(least)} ({least['achieved']:.0%}).")
        return "\n".join(lines) or "Nothing to mask."


@register("masks", requires=("groups",), config=MasksConfig)
def masks(store: ContributionStore, config: MasksConfig, context: Context) -> MasksResult:
    """Keep the heads, channels and weights with the highest F, an exact number of each.

    Returns:
        A :class:`MasksResult` over all chosen tasks.
    """
    structured = _structured(store, config, context)
    single, notes, details = None, [], {}
    if "unstructured" in config.kinds:
        reason = missing(store, ("fisher",))
        try:
            if reason is None:
                single = unstructured_masks(
                    store, context.tasks, config.sparsities, config.scope, context.memory_budget
                )
        except NotStoredError as error:
            reason = str(error)  # the run has not come to its first snapshot
        if reason is not None:
            details["unstructured"] = reason
            notes.append(f"no unstructured masks: {reason}")
    else:
        details["unstructured"] = 'not asked for: add "unstructured" to MasksConfig.kinds'
    return MasksResult(
        name="masks",
        config=asdict(config),
        frame=_frame(structured, single),
        extra=_tables(structured, single),
        details=details,
        warnings=notes,
        structured=structured,
        unstructured=single,
    )


def structured_keep(
    scores: NDArray[np.float64], layers: NDArray[np.integer], sparsity: float, scope: str
) -> NDArray[np.bool_]:
    """Mask of the units with the highest scores: over all, or within each layer.

    Args:
        scores: ``[units]``.
        layers: ``[units]``, numbers from 0; only their equality matters.
        sparsity: share that goes.
        scope: "global" or "layer".
    """
    if scope == "global":
        return keep_top(scores, keep_count(len(scores), sparsity))
    keep = np.zeros(len(scores), bool)
    for layer in np.unique(layers):
        places = np.flatnonzero(layers == layer)
        keep[places] = keep_top(scores[places], keep_count(len(places), sparsity))
    return keep


def _structured(
    store: ContributionStore, config: MasksConfig, context: Context
) -> dict[str, StructuredMasks]:
    tables = {task: store.groups(task) for task in context.tasks}
    found = {}
    for kind in config.kinds:
        scores, keep = {}, {}
        units = pd.DataFrame(columns=_PLACE)
        for task, groups in tables.items():
            rows = groups[(groups["kind"] == kind) & (groups["part"] == "weight")].reset_index(drop=True)
            units = rows[_PLACE]
            layers = units.groupby(["stack", "layer"], sort=False).ngroup().to_numpy()
            scores[task] = rows["mean"].to_numpy(np.float64)
            for sparsity in config.sparsities:
                keep[task, sparsity] = structured_keep(scores[task], layers, sparsity, config.scope)
        if len(units):
            found[kind] = StructuredMasks(units, scores, keep)
    return found


def _frame(structured: dict[str, StructuredMasks], single: UnstructuredMasks | None) -> pd.DataFrame:
    parts = []
    for kind, found in structured.items():
        for (task, sparsity), keep in found.keep.items():
            part = found.units[["stack", "layer"]].assign(units=1, kept=keep.astype(int))
            parts.append(part.assign(task=task, kind=kind, sparsity=sparsity))
    if single is not None:
        part = single.frame().assign(kind="unstructured")
        parts.append(part)
    if not parts:
        return pd.DataFrame(columns=_COLUMNS)
    cells = pd.concat(parts, ignore_index=True)
    keys = ["task", "kind", "sparsity"]
    layers = cells.groupby([*keys, "stack", "layer"], sort=False)[["units", "kept"]].sum().reset_index()
    whole = cells.groupby(keys, sort=False)[["units", "kept"]].sum().reset_index()
    frame = pd.concat(
        [whole.assign(level="all", stack="", layer=-1), layers.assign(level="layer")], ignore_index=True
    )
    frame["achieved"] = 1 - frame["kept"] / frame["units"]
    return frame[_COLUMNS]


def _tables(
    structured: dict[str, StructuredMasks], single: UnstructuredMasks | None
) -> dict[str, pd.DataFrame]:
    tables = {}
    if "head" in structured:
        found = structured["head"]
        parts = []
        for task, scores in found.scores.items():
            columns = {f"keep_{s}": mask for (t, s), mask in found.keep.items() if t == task}
            part = found.units.rename(columns={"index": "head"}).assign(score=scores, **columns)
            part.insert(0, "task", task)
            parts.append(part)
        tables["heads"] = pd.concat(parts, ignore_index=True)
    if single is not None:
        tables["parameters"] = single.frame()
    return tables
