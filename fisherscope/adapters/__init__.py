"""Model families to layouts: pure index data, checked numerically on the live model."""

from fisherscope.adapters.registry import (
    known_model_types,
    register,
    register_adapter,
    registered_adapter,
    resolve,
)

__all__ = ["known_model_types", "register", "register_adapter", "registered_adapter", "resolve"]
