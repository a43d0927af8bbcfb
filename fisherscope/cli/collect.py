"""``fisherscope collect``."""

from __future__ import annotations

from fisherscope.cli import options as opt
from fisherscope.cli.guard import guarded
from fisherscope.cli.request import make_extensions, open_scope
from fisherscope.cli.results import analyze_and_save, check_report, show_store
from fisherscope.cli.tasks import check_ranks, parse_batch_size, parse_tasks


@guarded
def collect(
    model: opt.Model,
    task: opt.Task,
    out: opt.Out,
    tokenizer: opt.Tokenizer = None,
    device: opt.Device = "auto",
    model_dtype: opt.Dtype = opt.ModelDtype.AUTO,
    attn: opt.Attention = None,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    max_samples: opt.MaxSamples = None,
    max_length: opt.MaxLength = None,
    store_text: opt.StoreText = True,
    objective: opt.Objective = "auto",
    parameters: opt.Parameters = ["linear"],  # noqa: B006 - typer copies it
    gradients: opt.Gradients = True,
    gradient_parameters: opt.GradientParameters = ["auto"],  # noqa: B006 - typer copies it
    gradient_dtype: opt.StoredDtype = opt.GradientDtype.BFLOAT16,
    encoding: opt.StoredEncoding = opt.GradientEncoding.AUTO,
    gradient_rank: opt.GradientRank = 8,
    gradient_samples: opt.GradientSamples = None,
    fisher: opt.Fisher = opt.FisherShape.FULL,
    labels: opt.Labels = [opt.LabelSource.DATA],  # noqa: B006 - typer copies it
    draws: opt.Draws = 1,
    normalization: opt.Normalize = opt.Normalization.PER_TOKEN,
    also: opt.Also = [],  # noqa: B006 - typer copies it
    batch_size: opt.BatchSize = "auto",
    memory_budget: opt.MemoryBudget = None,
    compute_dtype: opt.Compute = opt.ComputeDtype.FLOAT32,
    durability: opt.Durable = opt.Durability.POWER,
    rank: opt.Rank = 0,
    world_size: opt.WorldSize = 1,
    deterministic: opt.Deterministic = False,
    seed: opt.Seed = 0,
    resume: opt.Resume = True,
    force: opt.Force = False,
    check: opt.CheckBatches = opt.Check.AUTO,
    report: opt.Report = None,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Run a model over tasks and store every sample's gradients.

    A line of a task's file is `{"text"}`, `{"prompt", "completion"}` (loss on the completion only),
    `{"messages"}` (loss on the assistant's turns only) or `{"input_ids", "labels"}`; for classifiers
    `{"text", "label"}`, for encoder-decoders `{"text", "target"}`.

    Stopped or killed, the same command goes on where it was.

    Example:
        fisherscope collect --model ./my-model --task math=math.jsonl --task code=code.jsonl --out run.fs
    """
    del debug
    files = parse_tasks(task)
    size = parse_batch_size(batch_size)
    check_ranks(rank, world_size, resume=resume)
    if report is not None:
        check_report(report, "--report")
    extensions = make_extensions(
        fisher=fisher,
        labels=labels,
        draws=draws,
        normalization=normalization,
        gradients=gradients,
        gradient_parameters=gradient_parameters,
        gradient_dtype=gradient_dtype,
        encoding=encoding,
        gradient_rank=gradient_rank,
        gradient_samples=gradient_samples,
        also=also,
    )
    scope, rows = open_scope(
        model,
        tokenizer,
        files,
        parameters,
        device=device,
        dtype=model_dtype,
        attn=attn,
        revision=revision,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )
    store = scope.collect(
        rows,
        out,
        extensions=extensions,
        objective=objective,
        max_length=max_length,
        max_samples=max_samples,
        batch_size=size,
        memory_budget=memory_budget,
        compute_dtype=compute_dtype.value,
        store_text=store_text,
        durability=durability.value,
        rank=rank,
        world_size=world_size,
        deterministic=deterministic,
        seed=seed,
        resume=resume,
        force=force,
        check=check.value,
        quiet=quiet,
    )
    show_store(store)
    if report is not None:
        analyze_and_save(store, report, quiet=quiet)
