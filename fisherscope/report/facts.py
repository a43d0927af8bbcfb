"""What a report says about the run behind a store, as plain data."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fisherscope.analyses import ContributionStore


@dataclass(frozen=True)
class Facts:
    """Origin and extent of a store.

    Attributes:
        store_path: its directory.
        store_bytes: size of its files.
        model: name of the model, for a title.
        model_type: its architecture.
        layers: number of attention layers.
        heads, kv_heads: the numbers of query and of key/value heads that occur.
        tasks: one row per task: task, samples, expected, complete, tokens, loss, truncated, tokens_lost;
            ``loss`` in nats per loss-bearing token.
        has_text: whether texts are stored.
        coverage: one row per kind of parameter: kind, parameters, instrumented, weights,
            weights_instrumented, weights_with_gradients.
        left_out: names of the parameters that are not instrumented.
        shared: modules that run several times in a forward pass, and how often.
        normalization, fisher_shape: how F was collected.
        gradients: how sample gradients are stored, in words; "none".
        encodings: number of parameters by how their gradients are stored: dense, factored, lowrank.
        fingerprint: short digest of the run's identity.
        proofs: what the comparisons of batches with ordinary backward passes came to, by task.
        options, provenance: as the store has them.
    """

    store_path: Path
    store_bytes: int
    model: str
    model_type: str
    layers: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    tasks: pd.DataFrame
    has_text: bool
    coverage: pd.DataFrame
    left_out: tuple[str, ...]
    shared: tuple[tuple[str, int], ...]
    normalization: str
    fisher_shape: str
    gradients: str
    encodings: dict[str, int]
    fingerprint: str
    proofs: dict[str, dict[str, Any]]
    options: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def grouped_query(self) -> bool:
        """Whether several query heads share a key/value head."""
        return self.heads != self.kv_heads

    @property
    def share_instrumented(self) -> float:
        """Share of the model's weights that are instrumented."""
        total = int(self.coverage["weights"].sum())
        return float(self.coverage["weights_instrumented"].sum() / total) if total else math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain data: the run as ``results.json`` describes it."""
        return {
            "store": {
                "name": self.store_path.name,
                "bytes": self.store_bytes,
                "fingerprint": self.fingerprint,
                "proofs": self.proofs,
                "normalization": self.normalization,
                "fisher_shape": self.fisher_shape,
                "gradients": self.gradients,
                "gradient_encodings": self.encodings,
                "options": self.options,
            },
            "model": {
                "name": self.model,
                "model_type": self.model_type,
                "layers": self.layers,
                "heads": self.heads,
                "kv_heads": self.kv_heads,
            },
            "tasks": self.tasks.to_dict("records"),
            "coverage": {
                "share_instrumented": self.share_instrumented,
                "kinds": self.coverage.to_dict("records"),
                "left_out": self.left_out,
                "shared": [{"module": module, "runs": runs} for module, runs in self.shared],
            },
            "provenance": self.provenance,
        }


def facts_of(store: ContributionStore, tasks: tuple[str, ...] | None = None) -> Facts:
    """Gather what a report says about a store.

    Args:
        store: an open store.
        tasks: which tasks to speak of; None for all.
    """
    header, layout = store.header, store.layout
    table, has_text = _tasks(store, list(tasks or store.tasks))
    identity = json.dumps(header.fingerprint, sort_keys=True, default=str)
    return Facts(
        store_path=store.path,
        store_bytes=sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()),
        model=_model_name(header.provenance, layout.model_type),
        model_type=layout.model_type,
        layers=len(layout.attention),
        heads=tuple(sorted({a.n_heads for a in layout.attention})),
        kv_heads=tuple(sorted({a.n_kv_heads for a in layout.attention})),
        tasks=table,
        has_text=has_text,
        coverage=_coverage(store),
        left_out=tuple(p.name for p in layout.parameters if p.name not in set(store.parameters)),
        shared=tuple((found.module, found.runs) for found in layout.shared),
        normalization=header.normalization,
        fisher_shape=header.fisher_shape,
        gradients=header.gradients_in_words,
        encodings=dict(Counter(map(store.encoding, header.gradient_parameters))),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:12],
        proofs={task: found for task, found in store.proofs().items() if task in set(table["task"])},
        options=shallow(dict(header.options)),
        provenance=shallow(dict(header.provenance)),
    )


def shallow(value: Any, levels: int = 40) -> Any:
    """Plain data without what lies deeper than so many levels: a stranger's may be a thousand deep."""
    if isinstance(value, dict | list | tuple) and not levels:
        return "\N{HORIZONTAL ELLIPSIS}"
    if isinstance(value, dict):
        return {str(key): shallow(item, levels - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shallow(item, levels - 1) for item in value]
    return value


def _model_name(provenance: dict[str, Any], model_type: str) -> str:
    """The last two parts of the model's name or path, else its class, else its architecture."""
    parts = str(provenance.get("model_name") or "").replace("\\", "/").strip("/").split("/")
    name = "/".join(parts[-2:])
    return name or str(provenance.get("model_class") or model_type)


def _tasks(store: ContributionStore, names: list[str]) -> tuple[pd.DataFrame, bool]:
    rows, has_text = [], False
    for task in names:
        samples = store.samples(task)
        tokens = int(samples["tokens"].sum())
        has_text = has_text or "text" in samples
        rows.append(
            {
                "task": task,
                "samples": len(samples),
                "expected": store.n(task),
                "complete": store.is_complete(task),
                "tokens": tokens,
                "loss": float(samples["loss"].sum()) / tokens if tokens else None,
                "truncated": int((samples["truncated"] > 0).sum()),
                "tokens_lost": int(samples["truncated"].sum()),
            }
        )
    return pd.DataFrame(rows), has_text


def _coverage(store: ContributionStore) -> pd.DataFrame:
    chosen, stored = set(store.parameters), set(store.gradient_parameters)
    rows = pd.DataFrame(
        {
            "kind": info.kind,
            "parameters": 1,
            "instrumented": int(info.name in chosen),
            "weights": math.prod(info.shape),
            "weights_instrumented": math.prod(info.shape) * (info.name in chosen),
            "weights_with_gradients": math.prod(info.shape) * (info.name in stored),
        }
        for info in store.layout.parameters
    )
    return rows.groupby("kind", sort=False).sum().reset_index()
