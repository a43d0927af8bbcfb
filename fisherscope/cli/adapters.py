"""``fisherscope adapters`` and ``fisherscope adapters check``."""

from __future__ import annotations

import inspect
import json as json_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fisherscope.cli import options as opt
from fisherscope.cli.console import note, table
from fisherscope.cli.guard import guarded
from fisherscope.words import counted

if TYPE_CHECKING:
    from fisherscope.layout import ModelLayout

app = typer.Typer(
    help="The model families whose heads are known, and what is found in a model.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
@guarded
def adapters(
    context: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
    debug: opt.Debug = False,
) -> None:
    """List the registered model types; `fisherscope adapters check MODEL` looks at a model.

    A model type that is not listed is looked at more closely when it is wrapped: heads are found from the
    model's structure, and believed where a numeric check confirms them.
    """
    del debug
    if context.invoked_subcommand is not None:
        return
    from fisherscope.adapters import known_model_types, registered_adapter

    users: dict[Any, list[str]] = {}
    for model_type in known_model_types():
        users.setdefault(registered_adapter(model_type), []).append(model_type)
    described = [
        (_origin(a), types, (inspect.getdoc(a) or "").partition("\n")[0]) for a, types in users.items()
    ]
    if json:
        keys = ("adapter", "model_types", "layout")
        typer.echo(json_module.dumps([dict(zip(keys, d, strict=True)) for d in described], indent=2))
        return
    rows = [(", ".join(types), words, origin) for origin, types, words in described]
    table("registered adapters", ["model types", "where the heads are", "adapter"], rows, lines=True)
    note("other model types are detected from their structure: fisherscope adapters check MODEL")


@app.command()
@guarded
def check(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory of a transformers model, or its id on the hub.")
    ],
    strict: Annotated[bool, typer.Option("--strict", help="Fail where heads are not confirmed.")] = False,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Use the adapter of this model type, whatever the model's own is."),
    ] = None,
    parameters: Annotated[
        bool, typer.Option("--parameters", help="List every parameter, and whose its entries are.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    debug: opt.Debug = False,
) -> None:
    """Find the heads of a model of any kind, check every layer numerically, and say what can be collected.

    Example:
        fisherscope adapters check ./my-model
    """
    del debug
    from fisherscope.cli.loading import load_model
    from fisherscope.instrument.scope import wrap

    loaded = load_model(model, device="cpu", trust_remote_code=trust_remote_code)
    scope = wrap(loaded, adapter=adapter, verify="all", strict=strict)
    layout, coverage = scope.layout, scope.coverage()
    if json:
        facts = {
            "layout": layout.to_json(),
            "coverage": json_module.loads(coverage.to_json(orient="records")),
        }
        typer.echo(json_module.dumps(facts, indent=2, allow_nan=False))
        return
    _show_layout(layout)
    by_kind = coverage.groupby("kind", sort=False).agg(
        parameters=("parameter", "size"), entries=("size", "sum"), instrumented=("covered", "sum")
    )
    table(
        'coverage of parameters="linear"',
        ["kind", "parameters", "entries", "instrumented"],
        [(kind, int(r.parameters), int(r.entries), int(r.instrumented)) for kind, r in by_kind.iterrows()],
    )
    if parameters:
        table(
            "parameters",
            ["parameter", "shape", "kind", "belongs to", "not instrumented because"],
            [_parameter_row(layout, row) for row in coverage.itertuples()],
        )
    note(_verdict(layout))


def _origin(adapter: Any) -> str:
    return f"{adapter.__module__.removeprefix('fisherscope.adapters.families.')}.{adapter.__name__}"


def _show_layout(layout: ModelLayout) -> None:
    """One row per kind of attention layer, with the numbers of the layers."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for a in layout.attention:
        widths = f"{a.head_dim_qk}" if a.head_dim_qk == a.head_dim_v else f"{a.head_dim_qk}, {a.head_dim_v}"
        # a bias is marked at its block: Q+ K+ V+ O
        blocks = " ".join(b.name + "+" * (b.bias is not None) for b in a.blocks)
        key = (a.stack, f"{a.n_heads}, {a.n_kv_heads}", widths, blocks, " ".join(a.coupled) or "none")
        kinds.setdefault(key, []).append(a.layer)
    table(
        f"attention of {layout.model_type!r}",
        ["stack", "heads (Q, KV)", "width (QK, V)", "blocks (+ bias)", "coupled", "layers"],
        [(*key, _ranges(layers)) for key, layers in kinds.items()],
    )
    found = [
        ("MLPs", len(layout.mlps), "channels", sum(m.channels for m in layout.mlps)),
        ("mixtures", len(layout.experts), "experts", sum(e.experts for e in layout.experts)),
        ("other linear maps", len(layout.rows), "rows", sum(len(r.weight) for r in layout.rows)),
    ]
    table("beside attention", ["what", "number", "units", "in all"], [row for row in found if row[1]])
    if layout.shared:
        rows = [(module.module, module.runs) for module in layout.shared]
        table("shared by several layers", ["module", "runs in a forward pass"], rows)


def _ranges(numbers: list[int]) -> str:
    """``0-3, 5`` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _parameter_row(layout: ModelLayout, row: Any) -> tuple[str, ...]:
    flags = ", ".join(sorted(layout.flags(row.parameter)))
    return row.parameter, "x".join(map(str, row.shape)), row.kind, flags, row.reason


def _verdict(layout: ModelLayout) -> str:
    heads = sum(attention.n_heads for attention in layout.attention)
    if not heads:
        return "no heads: modules and rows only"
    how = "described by a registered adapter" if layout.source == "registered" else "found from the structure"
    return f"confirmed: every head ({heads}) of {counted(len(layout.attention), 'attention layer')}, {how}"
