"""Hooks, layer rules, extensions, objectives and the collection loop: what meets the live model."""
