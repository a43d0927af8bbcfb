"""Options that several commands share, and the choices that options offer."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

_MODEL, _DATA, _WHAT, _RUN = "Model", "Data", "What is collected", "How it runs"

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
    FLOAT16 = "float16"


class GradientEncoding(StrEnum):
    """Forms in which gradients are stored."""

    AUTO = "auto"
    DENSE = "dense"
    FACTORED = "factored"
    LOWRANK = "lowrank"
    GROUPS = "groups"


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


class Check(StrEnum):
    """Which batches are proved."""

    AUTO = "auto"
    EVERY = "every"
    FIRST = "first"
    OFF = "off"


class LabelSource(StrEnum):
    """Whose labels the Fisher is that of."""

    DATA = "data"
    SAMPLED = "sampled"
    EXACT = "exact"


class Quantity(StrEnum):
    """What may be collected beside the Fisher and the gradients."""

    KRONECKER = "kronecker"
    POSITIONS = "position_contributions"
    EXACT_PER_TOKEN = "exact_per_token"  # noqa: S105 - a word of the field, not a password


Model = Annotated[
    str,
    typer.Option(
        metavar="DIR|ID",
        help="Directory of a transformers model, or its id on the hub.",
        rich_help_panel=_MODEL,
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(metavar="DIR|ID", help="Directory or id, if not with the model.", rich_help_panel=_MODEL),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="auto (a GPU if there is one), cpu, cuda, cuda:1.", rich_help_panel=_MODEL
    ),
]
Dtype = Annotated[
    ModelDtype,
    typer.Option(
        metavar="TYPE",
        help="Of the weights: auto (the checkpoint's), float32, bfloat16, float16.",
        rich_help_panel=_MODEL,
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Attention: eager, sdpa, flash_attention_2.", rich_help_panel=_MODEL),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Branch, tag or commit on the hub.", rich_help_panel=_MODEL),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model's own code.", rich_help_panel=_MODEL)
]

Task = Annotated[
    list[str],
    typer.Option(metavar="NAME=FILE", help="A task and its JSONL file; repeat.", rich_help_panel=_DATA),
]
MaxSamples = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="First so many rows of each task.", rich_help_panel=_DATA),
]
MaxLength = Annotated[
    int | None,
    typer.Option(metavar="N", min=2, help="Cut longer rows at the right; counted.", rich_help_panel=_DATA),
]
StoreText = Annotated[
    bool, typer.Option(help="Keep the samples' texts for the report.", rich_help_panel=_DATA)
]
Objective = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="auto (what the model's head is for), causal_lm, masked_lm, seq2seq, sequence_classification, "
        "token_classification.",
        rich_help_panel=_DATA,
    ),
]

Parameters = Annotated[
    list[str],
    typer.Option(
        metavar="WHICH", help="attention, linear, all, or name patterns; repeat.", rich_help_panel=_WHAT
    ),
]
Gradients = Annotated[
    bool, typer.Option(help="Keep each sample's gradients (the bulk of a store).", rich_help_panel=_WHAT)
]
GradientParameters = Annotated[
    list[str],
    typer.Option(
        metavar="WHICH", help="Whose: auto, attention, all, or name patterns; repeat.", rich_help_panel=_WHAT
    ),
]
StoredDtype = Annotated[
    GradientDtype,
    typer.Option(
        "--gradient-dtype",
        "--dtype",
        metavar="TYPE",
        help="As stored: bfloat16, float32, float16 (with a scale per row).",
        rich_help_panel=_WHAT,
    ),
]
StoredEncoding = Annotated[
    GradientEncoding,
    typer.Option(
        "--encoding",
        metavar="FORM",
        help="dense; factored (by position, exact); lowrank; groups (none); auto: dense or factored.",
        rich_help_panel=_WHAT,
    ),
]
GradientRank = Annotated[
    int, typer.Option(metavar="R", min=1, help="Of --encoding lowrank.", rich_help_panel=_WHAT)
]
GradientSamples = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Of the first N samples of each task.", rich_help_panel=_WHAT),
]
Fisher = Annotated[
    FisherShape,
    typer.Option(
        metavar="SHAPE",
        help="full: F of every entry; groups: of heads and channels only.",
        rich_help_panel=_WHAT,
    ),
]
Labels = Annotated[
    list[LabelSource],
    typer.Option(
        metavar="SOURCE",
        help="Of the Fisher: data, sampled from the model, exact (few classes); repeat.",
        rich_help_panel=_WHAT,
    ),
]
Draws = Annotated[
    int,
    typer.Option(
        metavar="K", min=1, help="How often labels are sampled, a backward pass each.", rich_help_panel=_WHAT
    ),
]
Normalize = Annotated[
    Normalization,
    typer.Option(
        metavar="HOW", help="per_token: h = g / sqrt(T); none: g; mean: g / T.", rich_help_panel=_WHAT
    ),
]
Also = Annotated[
    list[Quantity],
    typer.Option(
        metavar="WHAT",
        help="Also kronecker, position_contributions or exact_per_token; repeat.",
        rich_help_panel=_WHAT,
    ),
]

BatchSize = Annotated[
    str, typer.Option(metavar="auto|N", help="Samples per backward pass.", rich_help_panel=_RUN)
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(metavar="BYTES", help="That auto may take, such as 8GB.", rich_help_panel=_RUN),
]
Compute = Annotated[
    ComputeDtype,
    typer.Option(
        metavar="TYPE",
        help="In which gradients are formed: float32, float64, bfloat16.",
        rich_help_panel=_RUN,
    ),
]
Durable = Annotated[
    Durability,
    typer.Option(
        metavar="LEVEL",
        help="What sealed samples survive: power (loss), process (killed), none.",
        rich_help_panel=_RUN,
    ),
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Deterministic algorithms only.", rich_help_panel=_RUN)
]
Rank = Annotated[
    int,
    typer.Option(metavar="K", min=0, help="Which of --world-size processes.", rich_help_panel=_RUN),
]
WorldSize = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="Processes that fill one store.", rich_help_panel=_RUN),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of sampled labels and masks.", rich_help_panel=_RUN)]
Force = Annotated[
    bool,
    typer.Option("--force", help="Go on where samples influence each other.", rich_help_panel=_RUN),
]
CheckBatches = Annotated[
    Check,
    typer.Option(
        "--check",
        metavar="WHICH",
        help="Which batches are proved by ordinary backward passes: auto, every, first, off.",
        rich_help_panel=_RUN,
    ),
]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="Directory of the store, such as run.fs.", rich_help_panel=_RUN)
]
Report = Annotated[
    Path | None,
    typer.Option(metavar="DIR|PAGE", help="Also analyze, and write the report there.", rich_help_panel=_RUN),
]
Resume = Annotated[bool, typer.Option(help="Go on with a store of the same run.", rich_help_panel=_RUN)]
EstimateOut = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Where the store would be; its disk is measured.", rich_help_panel=_RUN),
]
Measure = Annotated[bool, typer.Option(help="Run some batches, for time and memory.", rich_help_panel=_RUN)]
