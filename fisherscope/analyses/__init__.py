"""Analyses of a store, their registry and their results. Nothing here needs a model."""

from fisherscope.analyses import fisher, importance, masks, overlap, conflict, interference  # noqa: F401, I001 - order of runs
from fisherscope.analyses.config import (
    AnalyzeConfig,
    ConflictConfig,
    FisherConfig,
    ImportanceConfig,
    InterferenceConfig,
    MasksConfig,
    OverlapConfig,
)
from fisherscope.analyses.context import Context
from fisherscope.analyses.outcome import Failed, Outcome, SkipAnalysis, Skipped
from fisherscope.analyses.quantities import QUANTITIES
from fisherscope.analyses.registry import REGISTRY, Analysis, Registry, register, run
from fisherscope.analyses.result import SCHEMA_VERSION, Result
from fisherscope.store import ContributionStore, as_store, open_store

register_analysis = register

__all__ = [
    "QUANTITIES",
    "REGISTRY",
    "SCHEMA_VERSION",
    "Analysis",
    "AnalyzeConfig",
    "ConflictConfig",
    "Context",
    "ContributionStore",
    "Failed",
    "FisherConfig",
    "ImportanceConfig",
    "InterferenceConfig",
    "MasksConfig",
    "Outcome",
    "OverlapConfig",
    "Registry",
    "Result",
    "SkipAnalysis",
    "Skipped",
    "as_store",
    "open_store",
    "register",
    "register_analysis",
    "run",
]
