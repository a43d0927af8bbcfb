"""The one registry of analyses, and running them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, is_dataclass
from typing import Any, TypeVar

from fisherscope.analyses.config import PARTS, AnalyzeConfig, build
from fisherscope.analyses.context import Context, encoding_warnings, task_warnings
from fisherscope.analyses.outcome import Failed, Outcome, SkipAnalysis, Skipped
from fisherscope.analyses.quantities import QUANTITIES, missing
from fisherscope.analyses.result import Result
from fisherscope.errors import Interrupted, NotStoredError, UsageError
from fisherscope.plugins import Plugins
from fisherscope.store import ContributionStore
from fisherscope.telling import Steps, steps
from fisherscope.torch_state import in_standard_state

logger = logging.getLogger(__name__)

Function = Callable[[ContributionStore, Any, Context], Result]
F = TypeVar("F", bound=Function)


@dataclass(frozen=True)
class Analysis:
    """One registered analysis.

    Attributes:
        name: its key.
        function: ``(store, config, context) -> Result``.
        requires: names of quantities (see :mod:`fisherscope.analyses.quantities`).
        config: class of its options, or None.
        min_tasks: fewest tasks that it can work on.
    """

    name: str
    function: Function
    requires: tuple[str, ...]
    config: type | None
    min_tasks: int = 1

    @property
    def description(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]

    def options(self, settings: AnalyzeConfig) -> Any:
        """This analysis's own options out of those of a run.

        Raises:
            ValueError: options under this name are not of the config class, or not valid.
        """
        if self.config is None:
            return None
        own = getattr(settings, self.name) if self.name in PARTS else None
        given = settings.extra.get(self.name, own)
        if given is None:
            return self.config()
        if isinstance(given, self.config):
            return given
        if is_dataclass(given) or not hasattr(given, "keys"):
            raise UsageError(f"options of {self.name!r} must be a {self.config.__name__}, got {given!r}")
        return build(self.config, given)


@dataclass
class Registry:
    """Analyses by name, in order of registration."""

    analyses: dict[str, Analysis] = field(default_factory=dict)
    plugins: Plugins = field(default_factory=lambda: Plugins("fisherscope.analyses"))

    def register(
        self,
        name: str,
        *,
        requires: tuple[str, ...] = ("groups",),
        config: type | None = None,
        min_tasks: int = 1,
        replace: bool = False,
    ) -> Callable[[F], F]:
        """Decorator that adds an analysis.

        Args:
            name: its key in reports and on the command line.
            requires: what the store must hold: "groups", "fisher", "gradients".
            config: a frozen dataclass of options; its instance is the second argument of the function.
            min_tasks: with fewer tasks the analysis is skipped.
            replace: take the place of an analysis of the same name.

        Raises:
            ValueError: the name is taken, or a quantity is unknown.
        """
        if name in self.analyses and not replace:
            raise UsageError(f"an analysis {name!r} is already registered: pass replace=True to replace it")
        if unknown := [quantity for quantity in requires if quantity not in QUANTITIES]:
            raise UsageError(f"analysis {name!r}: unknown quantity {unknown[0]!r}, not in {list(QUANTITIES)}")

        def add(function: F) -> F:
            self.analyses[name] = Analysis(name, function, tuple(requires), config, min_tasks)
            return function

        return add

    def names(self) -> list[str]:
        """All analyses in the order they run, those of other packages included."""
        self.plugins.load()
        return list(self.analyses)

    def get(self, name: str) -> Analysis:
        """The analysis of that name.

        Raises:
            ValueError: there is none; the message lists those there are.
        """
        self.plugins.load()
        try:
            return self.analyses[name]
        except KeyError:
            raise UsageError(f"no analysis {name!r}: choose from {', '.join(self.analyses)}") from None


REGISTRY = Registry()
register = REGISTRY.register


@in_standard_state
def run(
    store: ContributionStore,
    names: Iterable[str] | None = None,
    config: AnalyzeConfig | None = None,
    *,
    registry: Registry = REGISTRY,
    quiet: bool = True,
) -> dict[str, Outcome]:
    """Run analyses on a store; one that fails does not stop the others.

    Args:
        store: an open store.
        names: which, in this order; None runs all that are registered.
        config: options; defaults where None.
        registry: where to look them up.
        quiet: no progress on stderr.

    Returns:
        For each name its :class:`Result`, or :class:`Skipped` with what to collect, or :class:`Failed`
        with the error.

    Raises:
        ValueError: an unknown analysis or task.
    """
    if isinstance(names, str):
        names = [names]
    chosen = [registry.get(name) for name in (registry.names() if names is None else names)]
    with steps("analyze", len(chosen), quiet=quiet) as told:
        runner = _Runner(store, config or AnalyzeConfig(), registry, told)
        return {analysis.name: runner.outcome(analysis.name) for analysis in chosen}


class _Runner:
    """Runs each analysis at most once, in whatever order they ask for each other."""

    def __init__(
        self, store: ContributionStore, settings: AnalyzeConfig, registry: Registry, told: Steps
    ) -> None:
        self.store = store
        self.registry = registry
        self.told = told
        self.context = Context(store, settings, self.outcome, told.detail)
        self.outcomes: dict[str, Outcome] = {}
        self.running: set[str] = set()

    def outcome(self, name: str) -> Outcome:
        if name in self.running:
            raise UsageError(f"analyses that wait for each other: {', '.join(sorted(self.running))}")
        if name not in self.outcomes:
            self.running.add(name)
            try:
                analysis = self.registry.get(name)
                with self.told.step(name):
                    self.outcomes[name] = self._run(analysis)
            finally:
                self.running.discard(name)
        return self.outcomes[name]

    def _run(self, analysis: Analysis) -> Outcome:
        tasks = self.context.tasks
        try:
            if len(tasks) < analysis.min_tasks:
                return Skipped(
                    analysis.name,
                    f"compares tasks and needs at least {analysis.min_tasks}, here is only "
                    f"{', '.join(map(repr, tasks)) or 'none'}; collect another task into the same store",
                )
            if (reason := missing(self.store, analysis.requires)) is not None:
                return Skipped(analysis.name, reason)
            options = analysis.options(self.context.settings)
            result = analysis.function(self.store, options, self.context)
            if "gradients" in analysis.requires:
                result.warnings[:0] = encoding_warnings(self.store, self.context)
            result.warnings[:0] = task_warnings(self.store, self.context)
        except Interrupted:
            raise
        except (SkipAnalysis, NotStoredError) as skip:
            return Skipped(analysis.name, str(skip))
        except Exception as error:
            failed = Failed.of(analysis.name, error)
            logger.error("analysis %s", failed)  # noqa: TRY400 - the outcome carries the traceback
            return failed
        return result
