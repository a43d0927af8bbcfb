"""What `collect` and `estimate` are asked for: the files, the model and the extensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisherscope.cli import options as opt
from fisherscope.cli.console import note
from fisherscope.cli.loading import load_model, load_tokenizer, require_tokenizer
from fisherscope.cli.tasks import parse_parameters

if TYPE_CHECKING:
    from fisherscope.instrument.scope import Scope


def open_scope(
    model: str,
    tokenizer: str | None,
    files: Mapping[str, Path],
    parameters: Sequence[str],
    *,
    device: str,
    dtype: opt.ModelDtype,
    attn: str | None,
    revision: str | None,
    trust_remote_code: bool,
    quiet: bool,
) -> tuple[Scope, dict[str, Any]]:
    """The wrapped model, and the rows of each task.

    Raises:
        DataError: a file cannot be read.
        ModelLoadError: the model or its tokenizer cannot be loaded.
    """
    instrumented = parse_parameters(parameters, ("attention", "linear", "all"), "--parameters")
    # the files first: a bad line should not have to wait for the model
    from fisherscope.instrument.data import read_task_file

    rows: dict[str, Any] = {name: read_task_file(file) for name, file in files.items()}
    if not quiet:
        note(f"loading {model}")
    network = load_model(
        model,
        device=device,
        dtype=dtype.value,
        attn=attn,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    words = load_tokenizer(tokenizer or model, revision=revision, trust_remote_code=trust_remote_code)
    require_tokenizer(words, tokenizer or model, rows)

    from fisherscope.instrument.scope import wrap

    return wrap(network, words, parameters=instrumented), rows


def make_extensions(
    *,
    fisher: opt.FisherShape,
    labels: Sequence[opt.LabelSource],
    draws: int,
    normalization: opt.Normalization,
    gradients: bool,
    gradient_parameters: Sequence[str],
    gradient_dtype: opt.GradientDtype,
    encoding: opt.GradientEncoding,
    gradient_rank: int,
    gradient_samples: int | None,
    also: Sequence[opt.Quantity],
) -> list[Any]:
    """The extensions, as `Scope.collect` takes them."""
    stored = parse_parameters(gradient_parameters, ("auto", "attention", "all"), "--gradient-parameters")
    from fisherscope.instrument.extensions import Fisher, SampleGradients

    sources: Any = [source.value for source in labels]
    extensions: list[Any] = [
        Fisher(shape=fisher.value, labels=sources, draws=draws, normalization=normalization.value)
    ]
    if gradients:
        kept = SampleGradients(
            parameters=stored,
            encoding=encoding.value,
            dtype=gradient_dtype.value,
            rank=gradient_rank,
            max_samples=gradient_samples,
        )
        extensions.append(kept)
    return [*extensions, *(quantity.value for quantity in also)]
