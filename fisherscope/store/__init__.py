"""The contribution store: immutable HDF5 shards, committed by a journal, read without libhdf5."""

from fisherscope.store.disk import Durability
from fisherscope.store.finalizing import Finalized, finalize
from fisherscope.store.reader import ContributionStore, as_store, open_store
from fisherscope.store.schema import FORMAT, FORMAT_VERSION, StoreHeader
from fisherscope.store.segment import SegmentWriter
from fisherscope.store.snapshot import Snapshot
from fisherscope.store.verification import Finding, Verification
from fisherscope.store.verifying import verify
from fisherscope.store.writer import StoreWriter

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "ContributionStore",
    "Durability",
    "Finalized",
    "Finding",
    "SegmentWriter",
    "Snapshot",
    "StoreHeader",
    "StoreWriter",
    "Verification",
    "as_store",
    "finalize",
    "open_store",
    "verify",
]
