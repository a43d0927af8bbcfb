"""``fisherscope collect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fisherscope.cli import options as opt
from fisherscope.cli.console import note
from fisherscope.cli.guard import guarded
from fisherscope.cli.loading import load_model, load_tokenizer, require_tokenizer
from fisherscope.cli.results import analyze_and_save, show_store
from fisherscope.cli.tasks import parse_batch_size, parse_parameters, parse_tasks

MODEL, DATA, WHAT, RUN = "Model", "Data", "What is collected", "How it runs"


@guarded
def collect(
    model: Annotated[
        str,
        typer.Option(
            metavar="DIR|ID",
            help="Directory of a transformers model, or its id on the hub.",
            rich_help_panel=MODEL,
        ),
    ],
    task: Annotated[
        list[str],
        typer.Option(metavar="NAME=FILE", help="A task and its JSONL file; repeat.", rich_help_panel=DATA),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory of the store, such as run.fs.", rich_help_panel=RUN)
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="DIR|ID", help="Directory or id, if not with the model.", rich_help_panel=MODEL),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="auto (a GPU if there is one), cpu, cuda, cuda:1.", rich_help_panel=MODEL
        ),
    ] = "auto",
    model_dtype: Annotated[
        opt.ModelDtype,
        typer.Option(
            metavar="TYPE",
            help="Of the weights: auto (the checkpoint's), float32, bfloat16, float16.",
            rich_help_panel=MODEL,
        ),
    ] = opt.ModelDtype.AUTO,
    attn: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Attention: eager, sdpa, flash_attention_2.", rich_help_panel=MODEL
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch, tag or commit on the hub.", rich_help_panel=MODEL),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code.", rich_help_panel=MODEL)
    ] = False,
    max_samples: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="First so many rows of each task.", rich_help_panel=DATA),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Cut longer rows at the right; counted.", rich_help_panel=DATA),
    ] = None,
    store_text: Annotated[
        bool, typer.Option(help="Keep the samples' texts for the report.", rich_help_panel=DATA)
    ] = True,
    parameters: Annotated[
        list[str],
        typer.Option(
            metavar="WHICH", help="attention, linear, all, or name patterns; repeat.", rich_help_panel=WHAT
        ),
    ] = ["linear"],  # noqa: B006 - typer copies it
    gradients: Annotated[
        bool, typer.Option(help="Keep each sample's gradients (the bulk of a store).", rich_help_panel=WHAT)
    ] = True,
    gradient_parameters: Annotated[
        list[str],
        typer.Option(
            metavar="WHICH", help="Whose: attention, all, or name patterns; repeat.", rich_help_panel=WHAT
        ),
    ] = ["attention"],  # noqa: B006 - typer copies it
    gradient_dtype: Annotated[
        opt.GradientDtype,
        typer.Option(
            "--gradient-dtype",
            "--dtype",
            metavar="TYPE",
            help="As stored: bfloat16, float32.",
            rich_help_panel=WHAT,
        ),
    ] = opt.GradientDtype.BFLOAT16,
    fisher: Annotated[
        opt.FisherShape,
        typer.Option(
            metavar="SHAPE",
            help="full: F of every entry; groups: of heads and channels only.",
            rich_help_panel=WHAT,
        ),
    ] = opt.FisherShape.FULL,
    normalization: Annotated[
        opt.Normalization,
        typer.Option(
            metavar="HOW", help="per_token: h = g / sqrt(T); none: g; mean: g / T.", rich_help_panel=WHAT
        ),
    ] = opt.Normalization.PER_TOKEN,
    batch_size: Annotated[
        str, typer.Option(metavar="auto|N", help="Samples per backward pass.", rich_help_panel=RUN)
    ] = "auto",
    compute_dtype: Annotated[
        opt.ComputeDtype,
        typer.Option(
            metavar="TYPE",
            help="In which gradients are formed: float32, float64, bfloat16.",
            rich_help_panel=RUN,
        ),
    ] = opt.ComputeDtype.FLOAT32,
    durability: Annotated[
        opt.Durability,
        typer.Option(
            metavar="LEVEL",
            help="What sealed samples survive: power (loss), process (killed), none.",
            rich_help_panel=RUN,
        ),
    ] = opt.Durability.POWER,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Deterministic algorithms only.", rich_help_panel=RUN)
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on with a store of the same run.", rich_help_panel=RUN)
    ] = True,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also analyze, and write the report there.", rich_help_panel=RUN),
    ] = None,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Run a model over tasks and store every sample's gradients.

    A line of a task's file is `{"text"}`, `{"prompt", "completion"}` (loss on the completion only),
    `{"messages"}` (loss on the assistant's turns only) or `{"input_ids", "labels"}`.

    Stopped or killed, the same command goes on where it was.

    Example:
        fisherscope collect --model ./my-model --task math=math.jsonl --task code=code.jsonl --out run.fs
    """
    del debug
    files = parse_tasks(task)
    size = parse_batch_size(batch_size)
    instrumented = parse_parameters(parameters, ("attention", "linear", "all"), "--parameters")
    stored = parse_parameters(gradient_parameters, ("attention", "all"), "--gradient-parameters")
    # the files first: a bad line should not have to wait for the model
    from fisherscope.instrument.data import read_jsonl

    rows = {name: read_jsonl(file) for name, file in files.items()}
    if not quiet:
        note(f"loading {model}")
    network = load_model(
        model,
        device=device,
        dtype=model_dtype.value,
        attn=attn,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    words = load_tokenizer(tokenizer or model, revision=revision, trust_remote_code=trust_remote_code)
    require_tokenizer(words, tokenizer or model, rows)

    from fisherscope.instrument.extensions import Fisher, SampleGradients
    from fisherscope.instrument.scope import wrap

    extensions: list[Any] = [Fisher(shape=fisher.value, normalization=normalization.value)]
    if gradients:
        extensions.append(SampleGradients(parameters=stored, dtype=gradient_dtype.value))
    store = wrap(network, words, parameters=instrumented).collect(
        rows,
        out,
        extensions=extensions,
        max_length=max_length,
        max_samples=max_samples,
        batch_size=size,
        compute_dtype=compute_dtype.value,
        store_text=store_text,
        durability=durability.value,
        deterministic=deterministic,
        resume=resume,
        quiet=quiet,
    )
    show_store(store)
    if report is not None:
        analyze_and_save(store, report)
