"""Per-sample gradients, Fisher information and interference for every attention head of a HF model.

    import fisherscope as fs

    scope = fs.wrap(model, tokenizer)
    store = scope.collect({"math": math_rows, "code": code_rows}, "run.fs")
    report = fs.analyze(store)

Names are loaded when they are first used, so that ``import fisherscope`` is quick.
"""

from __future__ import annotations

# typing and importlib take longer than all that the command needs before it looks after signals
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    from fisherscope.adapters import register_adapter
    from fisherscope.analyses import AnalyzeConfig, register_analysis
    from fisherscope.instrument.extensions import (
        ExactPerToken,
        Fisher,
        Kronecker,
        Positions,
        SampleGradients,
        register_extension,
    )
    from fisherscope.instrument.objectives import Objective, Predictions
    from fisherscope.instrument.rules import register_rule
    from fisherscope.instrument.scope import Scope, wrap
    from fisherscope.report import Report, analyze
    from fisherscope.store import ContributionStore, open_store
    from fisherscope.versions import __version__, show_versions

_HOMES = {
    "AnalyzeConfig": "fisherscope.analyses",
    "ContributionStore": "fisherscope.store",
    "ExactPerToken": "fisherscope.instrument.extensions",
    "Fisher": "fisherscope.instrument.extensions",
    "Kronecker": "fisherscope.instrument.extensions",
    "Objective": "fisherscope.instrument.objectives",
    "Positions": "fisherscope.instrument.extensions",
    "Predictions": "fisherscope.instrument.objectives",
    "Report": "fisherscope.report",
    "SampleGradients": "fisherscope.instrument.extensions",
    "Scope": "fisherscope.instrument.scope",
    "__version__": "fisherscope.versions",
    "analyze": "fisherscope.report",
    "open_store": "fisherscope.store",
    "register_adapter": "fisherscope.adapters",
    "register_analysis": "fisherscope.analyses",
    "register_extension": "fisherscope.instrument.extensions",
    "register_rule": "fisherscope.instrument.rules",
    "show_versions": "fisherscope.versions",
    "wrap": "fisherscope.instrument.scope",
}

__all__ = [
    "AnalyzeConfig",
    "ContributionStore",
    "ExactPerToken",
    "Fisher",
    "Kronecker",
    "Objective",
    "Positions",
    "Predictions",
    "Report",
    "SampleGradients",
    "Scope",
    "__version__",
    "analyze",
    "open_store",
    "register_adapter",
    "register_analysis",
    "register_extension",
    "register_rule",
    "show_versions",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fisherscope' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
