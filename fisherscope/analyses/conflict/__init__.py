"""How far samples of two tasks oppose each other, as plain natural-gradient cosines."""

from fisherscope.analyses.conflict.analysis import conflict
from fisherscope.analyses.conflict.cosines import cosines, effect_size, whiten
from fisherscope.analyses.conflict.result import ConflictResult

__all__ = ["ConflictResult", "conflict", "cosines", "effect_size", "whiten"]
