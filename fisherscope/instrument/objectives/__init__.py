"""Objectives: what loss each sample has. One file per objective."""

from fisherscope.instrument.objectives.causal_lm import causal_lm
from fisherscope.instrument.objectives.resolve import Objective, resolve_objective

__all__ = ["Objective", "causal_lm", "resolve_objective"]
