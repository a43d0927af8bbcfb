"""Modules that serve several layers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SharedModule:
    """A module that runs several times in one forward pass, as ALBERT's one layer does for all of its layers.

    A gradient of its parameters is the sum over these runs.

    Attributes:
        module: its path in the model.
        runs: how often it runs, as seen on a small input; at least 2.
    """

    module: str
    runs: int

    def __post_init__(self) -> None:
        if not isinstance(self.module, str) or type(self.runs) is not int or self.runs < 2:
            raise ValueError(f"no module that runs several times: {self.module!r}, {self.runs!r}")

    def holds(self, name: str) -> bool:
        """Whether a parameter or module of that name is part of it."""
        return not self.module or name == self.module or name.startswith(f"{self.module}.")

    def __str__(self) -> str:
        return f"{self.module} runs {self.runs:,} times in a forward pass"
