"""A description of a store in plain data, from ``store.json`` and the journals alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fisherscope.layout import ModelLayout
from fisherscope.store.keys import KEYS_DIRECTORY
from fisherscope.store.ledger import Ledger
from fisherscope.store.reader import ContributionStore, as_store
from fisherscope.store.schema import FORMAT, FORMAT_VERSION, HEADER_FILE, JOURNAL_DIRECTORY
from fisherscope.store.shard_record import ShardRecord
from fisherscope.store.token_texts import TOKENS_FILE

_KINDS = {
    "sample": "samples",
    "ids": "tokens",
    "labels": "tokens",
    "types": "tokens",
    "text": "text",
    "positions": "positions",
    "groups": "groups",
    "gradients": "gradients",
    "parameters": "gradients",
    "factors": "gradients",
    "lowrank": "gradients",
    "scales": "gradients",
}


def describe(store: ContributionStore | str | Path) -> dict[str, Any]:
    """What a store holds and how it was made; no shard is read, but for the errors of low-rank gradients.

    Returns:
        JSON-ready: path, format, model type, tasks (samples, committed, complete, samples in the
        aggregates), shards and bytes per kind, encodings of gradients, also in words, with the
        reason and, where some are low-rank, the median and the worst relative error per task, the proofs of
        batches, what the store knows its model by, element types, a summary of the layout, options,
        fingerprint and provenance.

    Raises:
        StoreFormatError: the directory is not a store.
        CorruptStoreError: it is damaged.
    """
    opened = as_store(store)
    header = opened.header
    return {
        "path": str(opened.path),
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model_type": header.layout.model_type,
        "tasks": {
            task: {
                "samples": opened.n(task),
                "committed": opened.committed(task),
                "complete": opened.is_complete(task),
                "aggregated": opened.fisher_count(task),
            }
            for task in opened.tasks
        },
        "ranks": [ledger.rank for ledger in opened.ledgers],
        "shards": sum(1 for ledger in opened.ledgers for _ in ledger.shards()),
        "bytes": _bytes(opened),
        "gradients": header.gradients_in_words,
        "encodings": dict(Counter(map(opened.encoding, header.gradient_parameters))),
        "encoding_reason": header.options.get("gradient_encodings"),
        "encoding_errors": _errors(opened),
        "proofs": opened.proofs(),
        "probe": _probe(opened),
        "gradient_dtype": header.gradient_dtype,
        "factor_dtype": header.encodings.dtype if header.encodings.of else None,
        "normalization": header.normalization,
        "fisher_shape": header.fisher_shape,
        "parameters": list(header.parameters),
        "gradient_parameters": list(header.gradient_parameters),
        "groups": len(header.groups),
        "layout": _layout(header.layout),
        "options": header.options,
        "fingerprint": header.fingerprint,
        "provenance": header.provenance,
    }


def _probe(store: ContributionStore) -> dict[str, Any] | None:
    """What the store knows its model by, and where another environment was met; None for older stores."""
    recorded = store.evidence("probe")
    if not recorded:
        return None
    kept = ("samples", "environment", "repeats", "rounding", "tolerance", "tolerance_elsewhere", "dtype")
    return {key: recorded[-1].get(key) for key in kept} | {"compared": store.evidence("compared")}


def _errors(store: ContributionStore) -> dict[str, dict[str, float]]:
    """Relative errors of low-rank gradients, over the samples and parameters of each task."""
    found = {}
    for task in store.tasks if store.header.encodings.named("lowrank") else ():
        errors = store.encoding_errors(task).to_numpy(float)
        if not np.isnan(errors).all():
            found[task] = {"median": float(np.nanmedian(errors)), "worst": float(np.nanmax(errors))}
    return found


def _bytes(store: ContributionStore) -> dict[str, int]:
    """Bytes per kind of data; ``overhead`` is file metadata and padding to pages."""
    found = dict.fromkeys((*_KINDS.values(), "aggregates", "constants", "overhead", "journals"), 0)
    for ledger in store.ledgers:
        for kind, shard in _shards(ledger):
            for dataset in shard.datasets:
                which = kind or _KINDS.get(dataset.name.split("/")[0], "samples")
                found[which] += dataset.spec.nbytes
            found["overhead"] += shard.nbytes - sum(d.spec.nbytes for d in shard.datasets)
    journals = (store.path / JOURNAL_DIRECTORY).glob("r*.journal")
    keys, tokens = (store.path / KEYS_DIRECTORY).glob("*"), store.path.glob(TOKENS_FILE)
    for path in (store.path / HEADER_FILE, *journals, *keys, *tokens):
        found["journals"] += path.lstat().st_size
    return {**found, "total": sum(found.values())}


def _shards(ledger: Ledger) -> Iterator[tuple[str, ShardRecord]]:
    for segments in ledger.segments.values():
        yield from (("", segment.shard) for segment in segments.values())
    yield from (("aggregates", snapshot.shard) for snapshot in ledger.snapshots.values())
    if ledger.constants is not None:
        yield "constants", ledger.constants.shard


def _layout(layout: ModelLayout) -> dict[str, Any]:
    return {
        "parameters": len(layout.parameters),
        "entries": sum(math.prod(info.shape) for info in layout.parameters),
        "attention_layers": len(layout.attention),
        "heads": sorted({a.n_heads for a in layout.attention}),
        "kv_heads": sorted({a.n_kv_heads for a in layout.attention}),
        "blocks": list(dict.fromkeys(block.name for _, block in layout.head_blocks())),
        "stacks": list(dict.fromkeys(a.stack for a in layout.attention)),
        "shared": [{"module": found.module, "runs": found.runs} for found in layout.shared],
        "mlps": len(layout.mlps),
        "channels": sorted({m.channels for m in layout.mlps}),
    }
