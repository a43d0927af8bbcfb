"""Which modules hold a model's parameters, and which of them are given every position in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fisherscope.adapters import registered_adapter, resolve
from fisherscope.errors import AdapterError
from fisherscope.instrument.rules import Rule, find_rule
from fisherscope.instrument.targets import EVERY_POSITION
from fisherscope.instrument.trial import try_out


@dataclass(frozen=True)
class Owner:
    """A module that holds a parameter.

    Attributes:
        path: where it is in the model.
        module: the module.
        local: name of the parameter in the module.
        rule: how its per-sample gradients follow from a call; None where none is known.
    """

    path: str
    module: nn.Module
    local: str
    rule: Rule | None


def owners_of(model: nn.Module) -> dict[nn.Parameter, list[Owner]]:
    """The modules of each parameter: a tied one has several.

    A module that merely holds what another one uses is left out, such as the head of BERT, which keeps the
    bias of a linear map inside of it.
    """
    found: dict[nn.Parameter, list[Owner]] = {}
    for path, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            rule = find_rule(module)
            known = rule if rule is not None and local in rule.handles else None
            found.setdefault(parameter, []).append(Owner(path, module, local, known))
    return {parameter: _users(owners) for parameter, owners in found.items()}


def _users(owners: list[Owner]) -> list[Owner]:
    if any(owner.rule for owner in owners):
        return [owner for owner in owners if owner.rule or not any(owner.module.children())]
    return owners


def given_every_position(model: nn.Module) -> frozenset[str]:
    """Parameters whose modules are given every position of every sample once and in order.

    Such a module may be given ``[n * positions, features]``, as those of OPT are. Only an adapter knows: an
    expert that happens to be given as many rows is given them in another order.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model_type, str) or registered_adapter(model_type) is None:
        return frozenset()
    try:
        layout = resolve(model, verify=False)
    except AdapterError:
        return frozenset()
    return frozenset(info.name for info in layout.parameters if info.kind in EVERY_POSITION)


def unseen(
    model: nn.Module, owners: Mapping[nn.Parameter, Sequence[Owner]], names: Mapping[nn.Parameter, str]
) -> dict[str, str]:
    """Parameters of a transformers model whose gradients calls do not show, and why."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return {}
    return try_out(model, {names[p]: [owner.module for owner in own] for p, own in owners.items()}).unseen
