"""Whether a model is still made of what it was made of when it was wrapped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fisherscope.adapters.tuned_parameters import adaptation
from fisherscope.adapters.usable import refuse_unusable
from fisherscope.errors import ModelChangedError


@dataclass(frozen=True)
class Structure:
    """What the layout and the choice of parameters were found from.

    Values are no part of it: weights may be loaded or cast in place, and parameters replaced by others of the
    same name and shape in the same module, for everything that runs looks them up by name.

    Attributes:
        modules: path -> module, of those that hold parameters or whose submodules do.
        shapes: of every parameter, tied ones under each of their names.
        same_as: name -> the first name of the same parameter.
        idle: parameters of adapters that take no part in what the model computes -> why.
    """

    modules: Mapping[str, nn.Module]
    shapes: Mapping[str, tuple[int, ...]]
    same_as: Mapping[str, str]
    idle: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        """What a model is made of now; nothing is run or copied."""
        modules = {
            path: module
            for path, module in model.named_modules(remove_duplicate=False)
            if next(module.parameters(), None) is not None
        }
        every = dict(model.named_parameters(remove_duplicate=False))
        own = {id(parameter): name for name, parameter in model.named_parameters()}
        shapes = {name: tuple(parameter.shape) for name, parameter in every.items()}
        same_as = {name: own[id(parameter)] for name, parameter in every.items()}
        return cls(modules, shapes, same_as, adaptation(model).idle)

    def changes(self, now: Structure) -> list[str]:
        """What is different now, in words, the causes before what follows from them."""
        replaced = [p for p, module in self.modules.items() if now.modules.get(p, module) is not module]
        shared = [name for name in self.shapes if name in now.shapes]
        groups = {
            "is another module": _outermost(replaced),
            "is new": [name for name in now.shapes if name not in self.shapes],
            "is gone": [name for name in self.shapes if name not in now.shapes],
            "has another shape": [n for n in shared if self.shapes[n] != now.shapes[n]],
            "is tied to another parameter, or no longer": _regrouped(self.same_as, now.same_as, shared),
            "was switched on or off, or merged": [n for n in shared if self.idle.get(n) != now.idle.get(n)],
        }
        return [_in_words(names, what) for what, names in groups.items() if names]

    def refuse_changes(self, model: nn.Module) -> None:
        """Refuse a model that is made of something else by now.

        Raises:
            AdapterError: it cannot be used at all any more: it was sharded, offloaded or quantised.
            ModelChangedError: modules or parameters were added, replaced, resized, tied or removed.
        """
        refuse_unusable(model)
        if changes := self.changes(Structure.of(model)):
            raise ModelChangedError(
                f"{type(model).__name__} has changed since it was wrapped: {'; '.join(changes)}. What is "
                "instrumented was chosen from what was there before; call fisherscope.wrap again"
            )


def _regrouped(before: Mapping[str, str], now: Mapping[str, str], names: list[str]) -> list[str]:
    """Names that stand for one parameter with other names than before."""
    groups: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
    for name in names:
        for found, same_as in zip(groups, (before, now), strict=True):
            found.setdefault(same_as[name], []).append(name)
    old, new = groups
    return [name for name in names if old[before[name]] != new[now[name]]]


def _outermost(paths: list[str]) -> list[str]:
    return [p for p in paths if not any(p.startswith(f"{other}.") for other in paths if other)]


def _in_words(names: list[str], what: str) -> str:
    more = f" (so with {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]} {what}{more}"
