"""Layer rules: how a type of layer yields per-sample gradients. One file per layer type."""

from fisherscope.instrument.rules.registry import LayerCall, Rule, find_rule, register_rule

__all__ = ["LayerCall", "Rule", "find_rule", "register_rule"]
