"""The Fisher in which each token is its own unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from typing_extensions import override

from fisherscope.errors import UsageError
from fisherscope.instrument.extensions.base import Collector, Context, Extension
from fisherscope.instrument.extensions.labelled_fisher import LabelledFisherCollector
from fisherscope.instrument.extensions.registry import register_extension
from fisherscope.plain import is_one_of


@register_extension
@dataclass(frozen=True)
class ExactPerToken(Extension):
    """F = E_i[mean over t of the squared gradient of token t's loss alone].

    It takes as many backward passes per batch as the longest sample has labels. The per-token Fisher of
    :class:`Fisher` exceeds it where the gradients of a sample's tokens cohere.

    Attributes:
        shape: "full" keeps F in the parameter's shape; "groups" keeps head, channel and parameter values.
    """

    name: ClassVar[str] = "exact_per_token"
    shape: Literal["full", "groups"] = "full"

    def __post_init__(self) -> None:
        if not is_one_of(self.shape, ("full", "groups")):
            raise UsageError(f"ExactPerToken(shape={self.shape!r}): use 'full' or 'groups'")

    @override
    def collector(self, context: Context) -> Collector:
        return LabelledFisherCollector(context, self.name, full=self.shape == "full")
