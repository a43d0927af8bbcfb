"""Which parameters are instrumented, through which module and rule, and why others are not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pandas as pd
from torch import nn

from fisherscope.adapters.modules import is_linear_map
from fisherscope.errors import CoverageError
from fisherscope.instrument.reference import unseen_by_hooks
from fisherscope.instrument.rules import Rule, find_rule
from fisherscope.layout import ModelLayout, ParameterInfo

# kinds of parameters whose modules are given every position of every sample once and in order
_EVERY_POSITION = frozenset({"attention", "mlp", "norm", "router"})

ParameterChoice = str | list[str] | tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """One module whose calls are watched.

    Attributes:
        path: where it is in the model.
        module: the module.
        rule: how it yields per-sample gradients.
        parameters: its own parameter names -> names as in ``named_parameters()``. A tied parameter has
            one name and several sites.
        every_position: whether it is part of an attention or MLP that the layout describes, which is given
            every position of every sample once and in order, as a routed expert is not.
    """

    path: str
    module: nn.Module
    rule: Rule
    parameters: dict[str, str]
    every_position: bool = False


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
            apart), "all", or a list of shell-style patterns of parameter names.

    Raises:
        CoverageError: nothing matches, or nothing that matches has a rule.
    """
    canonical = {id(p): name for name, p in model.named_parameters()}
    uses: dict[str, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            uses.setdefault(canonical[id(parameter)], []).append((path, module, local))
    rows, parameters = [], []
    found: dict[str, Site] = {}
    chosen = [i.name for i in layout.parameters if _is_selected(i, choice, [m for _, m, _ in uses[i.name]])]
    unseen = unseen_by_hooks(model, {name: [m for _, m, _ in uses[name]] for name in chosen})
    for info in layout.parameters:
        selected = info.name in chosen
        rules = [(path, module, local, find_rule(module)) for path, module, local in uses[info.name]]
        lacking = [module for _, module, local, rule in rules if not rule or local not in rule.handles]
        if len(lacking) < len(rules):
            # BERT's head holds the bias of a linear map inside of it: what uses it is that
            lacking = [module for module in lacking if not any(module.children())]
        missing = [type(module).__name__ for module in lacking]
        covered = selected and not missing and info.name not in unseen
        if covered:
            parameters.append(info.name)
            for path, module, local, rule in rules:
                if rule is not None and local in rule.handles:
                    site = found.setdefault(path, Site(path, module, rule, {}, info.kind in _EVERY_POSITION))
                    site.parameters[local] = info.name
        reason = ""
        if not selected:
            reason = "not selected"
        elif missing:
            reason = f"no rule for {missing[0]}"
        elif info.name in unseen:
            reason = unseen[info.name]
        rows.append((info, selected, covered, type(uses[info.name][0][1]).__name__, reason))
    coverage = _coverage_frame(rows)
    _check(coverage, choice)
    return Targets(tuple(parameters), tuple(found.values()), coverage)


def _is_selected(info: ParameterInfo, choice: ParameterChoice, modules: list[nn.Module]) -> bool:
    if not isinstance(choice, str):
        return any(fnmatchcase(info.name, pattern) for pattern in choice)
    if choice == "all":
        return True
    # a router is a linear map, too, but one of which expert acts, not of what it does
    is_map = info.layer >= 0 and info.kind != "router" and all(is_linear_map(m) for m in modules)
    if choice == "linear":
        return is_map
    if choice == "attention":
        return is_map and info.kind == "attention"
    raise ValueError(
        f"parameters={choice!r} is not a choice: use 'attention', 'linear', 'all' or a list of name patterns"
    )


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


def _check(coverage: pd.DataFrame, choice: ParameterChoice) -> None:
    selected = coverage[coverage["selected"]]
    if selected.empty:
        raise CoverageError(
            f"parameters={choice!r} matches no parameter of the model: see scope.coverage() for their names"
        )
    lost = selected[~selected["covered"]]
    if len(lost) == len(selected):
        raise CoverageError(
            f"none of the {len(selected)} parameters chosen by parameters={choice!r} has a layer rule "
            f"({lost['reason'].iloc[0]}): register one with fisherscope.register_rule"
        )
    if len(lost):
        reasons = ", ".join(f"{reason}: {n}" for reason, n in lost["reason"].value_counts().items())
        warnings.warn(
            f"{len(lost)} of {len(selected)} chosen parameters are not instrumented ({reasons}); "
            "scope.coverage() lists them",
            stacklevel=5,
        )
