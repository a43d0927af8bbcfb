"""Collections that are stopped half-way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fisherscope.instrument.collection import Collection


@contextmanager
def interrupted_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C arrives while that batch runs."""
    run_batch, seen = Collection.run_batch, []

    def run(self: Collection, *args: Any) -> None:
        run_batch(self, *args)
        seen.append(1)
        if len(seen) == batches:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Collection, "run_batch", run)
        yield
