"""Layer rules: how a type of layer yields per-sample gradients. One file per layer type."""

from fisherscope.instrument.rules.registry import Rule, find_rule, register_rule

__all__ = ["Rule", "find_rule", "register_rule"]
