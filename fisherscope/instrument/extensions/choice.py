"""Which linear maps a quantity is collected of."""

from __future__ import annotations

from collections.abc import Sequence

from fisherscope.errors import CoverageError, UsageError
from fisherscope.instrument.patterns import matching, suggestion
from fisherscope.layout import ModelLayout
from fisherscope.plain import is_one_of

Choice = str | Sequence[str]


def checked_choice(extension: str, parameters: Choice) -> Choice:
    """The choice in a form that cannot change.

    Raises:
        ValueError: a word that is no choice.
    """
    if is_one_of(parameters, ("attention", "all")):
        return parameters
    patterns = tuple(parameters) if isinstance(parameters, list | tuple) else ()
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise UsageError(
            f"{extension}(parameters={parameters!r}): use 'attention', 'all' or a list of name patterns"
        )
    return patterns


def chosen_weights(layout: ModelLayout, instrumented: Sequence[str], parameters: Choice) -> tuple[str, ...]:
    """The instrumented matrices that a choice names, in order.

    "attention" takes the linear maps of attention, with what adapters add; "all" those of MLPs and of other
    mixers of the layers, too, but no router; patterns take any matrix.
    """
    if not isinstance(parameters, str):
        matrices = (name for name in instrumented if len(layout.parameter(name).shape) == 2)
        return matching(matrices, parameters)
    kinds = {"attention"} if parameters == "attention" else {"attention", "mlp"}
    mixers = set() if parameters == "attention" else {rows.weight.parameter for rows in layout.rows}
    infos = [layout.parameter(name) for name in instrumented if name.endswith(".weight")]
    return tuple(
        info.name
        for info in infos
        if len(info.shape) == 2
        and info.layer >= 0
        and (info.kind in kinds or (info.kind == "other" and info.name in mixers))
    )


def none_chosen(extension: str, parameters: Choice, instrumented: Sequence[str]) -> CoverageError:
    """What to raise where a choice comes to nothing."""
    patterns = () if isinstance(parameters, str) else parameters
    return CoverageError(
        f"{extension}(parameters={parameters!r}) matches no instrumented weight of a linear map. "
        f"{suggestion(instrumented, patterns)}scope.parameters lists what is instrumented"
    )
