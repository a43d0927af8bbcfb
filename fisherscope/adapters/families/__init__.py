"""One file per group of families with the same module names."""
