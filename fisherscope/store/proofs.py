"""What the proofs of batches came to, out of a store's findings, and in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fisherscope.words import counted, several

if TYPE_CHECKING:
    from fisherscope.store.reader import ContributionStore

CANNOT_SEE = (
    "A proof compares random sums of the samples' gradients with an ordinary backward pass. It cannot see "
    "what both share: inputs that never reach the model, wrong targets or counts of tokens, where heads are "
    "cut, how gradients are encoded, and the order of rows."
)

_NUMBERS = ("batches", "proved", "not_provable", "largest_deviation", "tolerance", "smallest_error_seen")


def proofs(store: ContributionStore) -> dict[str, dict[str, Any]]:
    """The proofs of each task, over all runs and ranks that added to it.

    See :meth:`~fisherscope.store.reader.ContributionStore.proofs`. A task of which nothing is known is left
    out.
    """
    found: dict[str, dict[str, Any]] = {}
    for finding in store.evidence("proof"):
        task, mine = finding.get("task"), {key: finding.get(key) for key in _NUMBERS}
        if task not in store.tasks or not all(isinstance(value, int | float) for value in mine.values()):
            continue  # written by something else
        words = {key: str(finding.get(key, "")) for key in ("largest_at", "dtype")}
        found[task] = _joined(found[task], mine | words) if task in found else mine | words
    return {
        task: mine | {"in_words": _in_words(mine), "cannot_see": CANNOT_SEE} for task, mine in found.items()
    }


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    sums = {key: first[key] + second[key] for key in ("batches", "proved", "not_provable")}
    worst = max(first, second, key=_excess)
    seen = max(first["smallest_error_seen"], second["smallest_error_seen"])
    return {**worst, **sums, "smallest_error_seen": seen}


def _excess(found: dict[str, Any]) -> tuple[float, float]:
    """How many times its tolerance the largest deviation is; of equal ones that which proved something."""
    return found["largest_deviation"] / (found["tolerance"] or 1.0), found["tolerance"]


def _in_words(found: dict[str, Any]) -> str:
    """One sentence or two about the proofs of a task."""
    proved, batches, failed = (int(found[key]) for key in ("proved", "batches", "not_provable"))
    missing = f" {failed} more could not be, for want of memory." if failed else ""
    of_all = counted(batches, "batch", "batches")
    if not proved:
        return f"None of {of_all} was compared with an ordinary backward pass.{missing}"
    verb = several(proved, "was", "were")
    return (
        f"{proved} of {of_all} {verb} compared with an ordinary backward pass.{missing} The largest "
        f"deviation is {found['largest_deviation']:.1g}, and {found['tolerance']:.1g} would be rounding "
        f"({found['dtype']}). An error of {100 * found['smallest_error_seen']:.2g} % in the gradient of one "
        "sample of these batches would have been seen."
    )
