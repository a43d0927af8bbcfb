"""Options that several commands share, and the choices that options offer."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes; results only.")]


class ModelDtype(StrEnum):
    """Types of weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class FisherShape(StrEnum):
    """Shapes in which F is kept."""

    FULL = "full"
    GROUPS = "groups"


class Normalization(StrEnum):
    """Scales of a sample's gradient."""

    PER_TOKEN = "per_token"  # noqa: S105 - a word of the field, not a password
    NONE = "none"
    MEAN = "mean"


class GradientDtype(StrEnum):
    """Types in which gradients are stored."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class ComputeDtype(StrEnum):
    """Types in which gradients are formed."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"


class Durability(StrEnum):
    """What a committed sample survives."""

    POWER = "power"
    PROCESS = "process"
    NONE = "none"
