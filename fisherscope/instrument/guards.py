"""What surrounds a collection: room on the disk, nothing left behind, and the random state restored."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from fisherscope.errors import CoverageError, StoreError, StoreFullError, UsageError
from fisherscope.instrument.estimate import Estimate
from fisherscope.store import StoreWriter, open_store


@contextmanager
def nothing_half_written(writer: StoreWriter) -> Iterator[None]:
    """Take away a store that this writer began and that fails before it has committed a sample."""
    try:
        yield
    except Exception:
        with suppress(Exception):  # what went wrong is to be told, and on any doubt the store stays
            writer.remove_if_empty()
        raise


def refuse_changed_gradients(model: nn.Module) -> None:
    """Hooks on parameters clip or rescale gradients, which then are gradients of no loss.

    Raises:
        CoverageError: a parameter has such a hook.
    """
    hooked = [name for name, parameter in model.named_parameters() if parameter._backward_hooks]
    if hooked:
        raise CoverageError(
            f"hooks on {', '.join(hooked[:3])}{', ...' if len(hooked) > 3 else ''} ({len(hooked)} "
            "parameters) change gradients, as clipping does: what is collected are gradients of the loss, so "
            "remove the hooks (the handles that parameter.register_hook returned) first"
        )


def _there(estimate: Estimate, path: Path) -> int:
    """Bytes of the estimate that a store holds already."""
    if not path.is_dir():
        return 0
    try:
        store = open_store(path)
    except (StoreError, OSError):
        return 0
    done = sum(min(store.committed(task), n) for task, n in estimate.tasks.items() if task in store.tasks)
    aggregated = sum(task in store.tasks and store.fisher_count(task) > 0 for task in estimate.tasks)
    return done * estimate.bytes_per_sample + aggregated * estimate.accumulator_bytes


def directory_at_hand(path: str | Path) -> Path:
    """The directory that is there already, on the disk that this one will be on.

    Raises:
        UsageError: a file is in its place.
    """
    found = Path(path).expanduser().absolute()
    while not found.exists():
        found = found.parent
    if not found.is_dir():
        raise UsageError(f"{found} is a file: name a directory")
    return found


def refuse_if_disk_is_small(estimate: Estimate, path: Path) -> None:
    """Compare what is still to be written with what is free.

    Raises:
        StoreFullError: the disk cannot hold it; the message names cheaper ways.
    """
    parent = directory_at_hand(path)
    there = _there(estimate, path)
    needed, free = estimate.disk_bytes - there, shutil.disk_usage(parent).free
    if needed > free:
        ways = [f"SampleGradients({words}): {size - there:,}" for words, size in estimate.cheaper]
        raise StoreFullError(
            f"{path} would take {needed:,} bytes more and {free:,} are free. Cheaper: "
            + "".join(f"{way}; " for way in ways)
            + "store fewer gradients with SampleGradients(parameters=[...], max_samples=...), "
            'use Fisher(shape="groups"), or max_samples'
        )


@contextmanager
def random_state(seed: int, *, deterministic: bool) -> Iterator[None]:
    """A seeded random state, and the one before restored."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        if deterministic:
            torch.use_deterministic_algorithms(mode=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(mode=before, warn_only=warn_only)
