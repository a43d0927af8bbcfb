"""Objectives: what loss each sample has. One file per objective."""

from fisherscope.instrument.objectives.base import Objective, Predict, Predictions
from fisherscope.instrument.objectives.resolve import CAUSAL_LM, resolve_objective

__all__ = ["CAUSAL_LM", "Objective", "Predict", "Predictions", "resolve_objective"]
