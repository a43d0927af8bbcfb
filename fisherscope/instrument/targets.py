"""Which parameters are instrumented, through which module and rule, and why others are not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

import pandas as pd
from torch import nn

from fisherscope.adapters.derived import is_derived_map, raw_parameters
from fisherscope.adapters.injected import tuned_layers
from fisherscope.adapters.modules import is_linear_map
from fisherscope.adapters.tuned_parameters import Adaptation, adaptation
from fisherscope.errors import CoverageError, UsageError
from fisherscope.instrument.batch_axes import CallAxes
from fisherscope.instrument.patterns import matching, suggestion
from fisherscope.instrument.rules import Rule, find_rule
from fisherscope.instrument.trial import Trial, try_out
from fisherscope.layout import ModelLayout, ParameterInfo

# kinds of parameters whose modules are given every position of every sample once and in order
EVERY_POSITION = frozenset({"attention", "mlp", "norm", "router"})

# what to choose where adapters have nothing to offer
_OTHERS = (
    'pass parameters="all" for those of the model itself, too, or patterns of names such as '
    'parameters=["*.base_layer.*"]'
)

ParameterChoice = str | list[str] | tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """One module whose calls are watched.

    Attributes:
        path: where it is in the model.
        module: the module.
        rule: how it yields per-sample gradients; None if its call is run again sample by sample.
        parameters: its own parameter names -> names as in ``named_parameters()``. A tied parameter has
            one name and several sites.
        every_position: whether it is part of an attention or MLP that the layout describes, which is given
            every position of every sample once and in order, as a routed expert is not.
        axes: of a module without a rule, which axes of its tensors run over samples.
    """

    path: str
    module: nn.Module
    rule: Rule | None
    parameters: dict[str, str]
    every_position: bool = False
    axes: CallAxes = field(default_factory=CallAxes)


@dataclass(frozen=True)
class Targets:
    """The instrumented parameters of one model.

    Attributes:
        parameters: their names, in model order.
        sites: the modules to watch.
        coverage: one row per parameter of the model: parameter, shape, size, kind, layer, selected,
            covered, rule, reason.
    """

    parameters: tuple[str, ...]
    sites: tuple[Site, ...]
    coverage: pd.DataFrame


def select_targets(model: nn.Module, layout: ModelLayout, choice: ParameterChoice) -> Targets:
    """Match the choice of parameters with the rules there are.

    Args:
        model: the model.
        layout: its layout.
        choice: "attention" (Q, K, V, O with biases), "linear" (the layers' linear maps with biases, routers
            apart), "all", or a list of shell-style patterns of parameter names. Where adapters of PEFT are in
            use, "attention" and "linear" take what these train in the layers, and nothing of the model's own;
            "all" takes both. Parameters of adapters that are merged, disabled or not active are chosen by
            patterns alone, and named in the coverage.

    Raises:
        CoverageError: nothing matches, or nothing that matches has a rule.
    """
    uses = _uses(model)
    tuned = adaptation(model)
    chosen = {
        info.name
        for info in layout.parameters
        if _is_selected(info, choice, [use.module for use in uses[info.name]], tuned)
    }
    in_order = {u.module for i in layout.parameters if i.kind in EVERY_POSITION for u in uses[i.name]}
    trial = try_out(model, {name: [use.module for use in uses[name]] for name in chosen}, in_order)
    found = {name: _watched(uses[name], trial, name) for name in chosen - tuned.idle.keys()}
    enclosing, axes = _through_enclosing(model, [name for name, (_, reason) in found.items() if reason])
    found |= enclosing
    axes = {**trial.replayable, **axes}
    rows, parameters = [], []
    sites: dict[str, Site] = {}
    for info in layout.parameters:
        mine, reason = found.get(info.name, ([], tuned.idle.get(info.name, "not selected")))
        if not reason:
            parameters.append(info.name)
            for use in mine:
                every = info.kind in EVERY_POSITION
                known = axes.get(use.module, CallAxes())
                site = sites.setdefault(use.path, Site(use.path, use.module, use.rule, {}, every, known))
                site.parameters[use.local] = info.name
        kind = type(uses[info.name][0].module).__name__
        rows.append((info, info.name in chosen, not reason, kind, reason))
    coverage = _coverage_frame(rows)
    _check(coverage, choice, tuned)
    if tuned.idle and not tuned.trained and choice in ("attention", "linear"):
        name, reason = next(iter(tuned.idle.items()))
        warnings.warn(
            f"no adapter of PEFT is in use ({name}: {reason}), so that parameters={choice!r} takes weights "
            "of the model itself, as it computes now: for gradients of adapters call unmerge_adapter(), "
            "enable_adapter_layers() or set_adapter() first, and wrap again",
            stacklevel=4,
        )
    return Targets(tuple(parameters), tuple(sites.values()), coverage)


@dataclass(frozen=True)
class _Use:
    """A module that holds a parameter, and under which name."""

    path: str
    module: nn.Module
    local: str
    rule: Rule | None


def _uses(model: nn.Module) -> dict[str, list[_Use]]:
    """Where each parameter is: a tied one in several modules."""
    canonical = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, list[_Use]] = {}
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in inside:  # a parametrisation is run by the module whose tensor it computes
            continue
        raw = list(raw_parameters(module))
        if raw:
            inside.update(module.get_submodule("parametrizations").modules())
        for local, parameter in (*module.named_parameters(recurse=False), *raw):
            rule = find_rule(module)
            known = rule if rule is not None and local in rule.handles else None
            found.setdefault(canonical[id(parameter)], []).append(_Use(path, module, local, known))
    return found


def _through_enclosing(
    model: nn.Module, names: list[str]
) -> tuple[dict[str, tuple[list[_Use], str]], dict[nn.Module, CallAxes]]:
    """Parameters that can be had by running a module again in which theirs is.

    T5's table of position biases is looked up once for all samples, but its attention is called for each.
    PEFT multiplies bare parameters in the layer that it has put around one of the model's, and DoRA calls
    LoRA's matrices on a unit matrix, too.

    Returns:
        The modules of each parameter that was found, and the axes over samples of their calls.
    """
    found: dict[str, tuple[list[_Use], str]] = {}
    axes: dict[nn.Module, CallAxes] = {}
    for enclosing in (tuned_layers(model), _parents(model, names, 1), _parents(model, names, 2)):
        wanted = {id(model.get_parameter(name)): name for name in names if name not in found}
        uses: dict[str, list[_Use]] = {}
        for path, module in enclosing.items():
            for local, parameter in module.named_parameters(remove_duplicate=False):
                if id(parameter) in wanted:
                    uses.setdefault(wanted[id(parameter)], []).append(_Use(path, module, local, None))
        uses = {name: _innermost(mine) for name, mine in uses.items()}
        if uses:
            trial = try_out(model, {name: [use.module for use in mine] for name, mine in uses.items()})
            axes |= trial.replayable
            found |= {
                name: (mine, "")
                for name, mine in uses.items()
                if name not in trial.unseen and all(use.module in trial.replayable for use in mine)
            }
    return found, axes


def _innermost(uses: list[_Use]) -> list[_Use]:
    """Modules that hold none of the others: a parameter would count twice through nested ones."""
    return [use for use in uses if not any(other.path.startswith(f"{use.path}.") for other in uses)]


def _parents(model: nn.Module, names: list[str], levels: int) -> dict[str, nn.Module]:
    """The modules that are so many levels above those of the parameters, inside of the layers."""
    paths = {name.rsplit(".", levels + 1)[0] for name in names if name.count(".") > levels + 2}
    return {path: model.get_submodule(path) for path in sorted(paths)}


def _watched(uses: list[_Use], trial: Trial, name: str) -> tuple[list[_Use], str]:
    """Which modules to watch for a parameter, or why its gradients cannot be had."""
    uses = [replace(use, rule=None) if use.module in trial.unruled else use for use in uses]
    if any(use.rule for use in uses):
        # BERT's head holds the bias of a linear map inside of it: what uses it is that
        uses = [use for use in uses if use.rule or not any(use.module.children())]
    lacking = [use.module for use in uses if not use.rule and use.module not in trial.replayable]
    reason = f"no rule for {type(lacking[0]).__name__}" if lacking else trial.unseen.get(name, "")
    return uses, reason


def _is_selected(
    info: ParameterInfo, choice: ParameterChoice, modules: list[nn.Module], tuned: Adaptation
) -> bool:
    if not isinstance(choice, str):
        return bool(matching([info.name], choice))
    if choice not in {"all", "linear", "attention"}:
        raise UsageError(
            f"parameters={choice!r} is not a choice: use 'attention', 'linear', 'all' or a list of name "
            "patterns"
        )
    if choice == "all" or info.name in tuned.idle:
        return info.name not in tuned.idle
    # a router is a linear map, too, but one of which expert acts, not of what it does
    in_layers = info.layer >= 0 and info.kind != "router"
    if tuned.trained:
        wanted = in_layers and info.name in tuned.trained
    else:
        wanted = in_layers and all(is_linear_map(m) or is_derived_map(m) for m in modules)
    return wanted and (choice == "linear" or info.kind == "attention")


def _coverage_frame(rows: list[tuple[ParameterInfo, bool, bool, str, str]]) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "parameter": [info.name for info, *_ in rows],
            "shape": [info.shape for info, *_ in rows],
            "kind": [info.kind for info, *_ in rows],
            "layer": [info.layer for info, *_ in rows],
            "module": [module for *_, module, _ in rows],
            "selected": [selected for _, selected, *_ in rows],
            "covered": [covered for _, _, covered, *_ in rows],
            "reason": [reason for *_, reason in rows],
        }
    )
    sizes = []
    for shape in frame["shape"]:
        size = 1
        for n in shape:
            size *= n
        sizes.append(size)
    frame.insert(2, "size", sizes)
    return frame


def _check(coverage: pd.DataFrame, choice: ParameterChoice, tuned: Adaptation) -> None:
    selected = coverage[coverage["selected"]]
    is_of_adapters = bool(tuned.trained) and isinstance(choice, str) and choice != "all"
    if selected.empty:
        what = "that adapters of PEFT train in the layers" if is_of_adapters else "of the model"
        patterns = () if isinstance(choice, str) else choice
        raise CoverageError(
            f"parameters={choice!r} matches no parameter {what}: "
            + suggestion(list(coverage["parameter"]), patterns)
            + (_OTHERS if is_of_adapters else "see scope.coverage() for their names")
        )
    lost = selected[~selected["covered"]]
    if len(lost) == len(selected):
        raise CoverageError(
            f"none of the {len(selected)} parameters chosen by parameters={choice!r} can be instrumented "
            f"({lost['parameter'].iloc[0]}: {lost['reason'].iloc[0]}): "
            + (_OTHERS if is_of_adapters else "register a rule with fisherscope.register_rule")
        )
    if len(lost):
        reasons = ", ".join(f"{reason}: {n}" for reason, n in lost["reason"].value_counts().items())
        warnings.warn(
            f"{len(lost)} of {len(selected)} chosen parameters are not instrumented ({reasons}); "
            "scope.coverage() lists them",
            stacklevel=5,
        )
