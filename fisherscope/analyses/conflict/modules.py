"""How much both tasks move each parameter, and the same channels of each MLP: from group values alone."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fisherscope.analyses.conflict.cosines import Blocks
from fisherscope.analyses.groupvalues import group_chunks
from fisherscope.store import ContributionStore

KEY = ["level", "stack", "layer", "parameter"]
COLUMNS = [*KEY, "kind", "size", "share_a", "share_b", "overlap", "overlap_within"]

Values = NDArray[np.float64]


class SharedLoad:
    """Shares and overlaps of tasks, whatever was stored of gradients.

    They have no sign: tasks that move the same channels may help or harm each other. Where gradients are
    stored, cosines tell.
    """

    def __init__(self, store: ContributionStore, rows: dict[str, int], memory_budget: int) -> None:
        """Read the group values of these samples once; overlaps are those of as many as fit the budget."""
        groups = store.group_table.frame()
        layout = {info.name: info for info in store.layout.parameters}
        self._parameters = groups[groups["kind"] == "parameter"]
        self._kinds = [layout[name].kind for name in self._parameters["parameter"]]
        channels = groups[groups["kind"] == "channel"]
        self._modules = [*channels.groupby(["stack", "layer", "parameter"], sort=False)]
        fit = memory_budget // (8 * max(1, len(channels)) * max(1, len(rows)))
        self._shares: dict[str, Values] = {}
        self._channels: dict[str, list[NDArray[np.float32]]] = {}
        for task, n in rows.items():
            sums, parts = np.zeros(len(groups)), []
            for chunk in group_chunks(store, task, memory_budget):
                values = chunk.contributions(store.header.normalization)
                sums += values.sum(0)
                # a channel's part is the norm of its gradient
                kept = values[: max(0, min(n, fit) - chunk.first), channels.index.to_numpy()]
                parts.append(np.sqrt(kept).astype(np.float32))
            share = sums[self._parameters.index.to_numpy()]
            self._shares[task] = share / share.sum() if share.any() else np.full(len(share), np.nan)
            together = np.concatenate(parts) if parts else np.zeros((0, len(channels)), np.float32)
            places = [channels.index.get_indexer(part.index) for _, part in self._modules]
            self._channels[task] = [together[:, place] for place in places]

    def frame(self, a: str, b: str) -> pd.DataFrame:
        """One row per instrumented parameter, then one per MLP.

        Returns:
            level ("parameter" or "module"), stack, layer, parameter (or path of the module), kind, size;
            share_a and share_b, of the task's F summed over all instrumented parameters; for an MLP overlap,
            the mean cosine of a sample of each task by the norms of their gradients per channel, and
            overlap_within, that of different samples of one task; NaN for a parameter.
        """
        parameters = self._parameters
        frame = pd.DataFrame({"level": "parameter", "kind": self._kinds}, index=parameters.index)
        frame = pd.concat([frame, parameters[["stack", "layer", "parameter", "size"]]], axis=1)
        frame["share_a"], frame["share_b"] = self._shares[a], self._shares[b]
        rows = []
        for number, ((stack, layer, module), part) in enumerate(self._modules):
            both = [self._channels[task][number].astype(np.float64) for task in (a, b)]
            together = np.concatenate(both)
            blocks = Blocks(together @ together.T, len(both[0]))
            own = frame[frame["parameter"].str.startswith(f"{module}.")]
            rows.append({
                "level": "module", "stack": stack, "layer": layer, "parameter": module, "kind": "mlp",
                "size": int(part["size"].sum()), "share_a": own["share_a"].sum(),
                "share_b": own["share_b"].sum(),
                "overlap": float(blocks.cross.mean()) if blocks.cross.size else np.nan,
                "overlap_within": blocks.reference,
            })  # fmt: skip
        return pd.concat([frame, pd.DataFrame(rows)], ignore_index=True).reindex(columns=COLUMNS)
