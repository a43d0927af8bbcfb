"""Rows for each sample where all samples share an output, and whether a model bears them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fisherscope.instrument.batch_axes import CallAxes, agree
from fisherscope.instrument.forwards import Forward
from fisherscope.instrument.lookup import own_rows
from fisherscope.instrument.small_runs import SAMPLES, SmallRuns


@dataclass(frozen=True)
class OwnRows:
    """Stands around a module whose output all samples share, and gives each sample rows of its own.

    Attributes:
        axes: of a module without a rule; None for a lookup.
        changed: add something to the rows of so many samples, the last ones.
    """

    axes: CallAxes | None = None
    changed: int = 0

    def __call__(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the module."""
        output = forward(*args, **kwargs)
        if self.axes is None:
            return self._last_changed(own_rows(output, SAMPLES[0]))
        known = self.axes.outputs

        def expanded(place: Any, value: Any) -> Any:
            if not isinstance(value, Tensor) or known.get(pytree.keystr(place), 0) is not None:
                return value
            return self._last_changed(value.expand(SAMPLES[0], *value.shape[1:]))

        return pytree.tree_map_with_path(expanded, output)

    def _last_changed(self, rows: Tensor) -> Tensor:
        if not self.changed or not rows.is_floating_point():
            return rows
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(rows.shape[1:], generator=generator, dtype=torch.float32, device="cpu")
        rows = rows.clone()
        rows[-self.changed :] += noise.to(rows)
        return rows


def bears_own_rows(runs: SmallRuns, makers: Mapping[nn.Module, OwnRows]) -> bool:
    """Whether nothing changes with rows for each sample, and each sample uses its own and no other's."""
    same = runs.again(makers)
    last, every = (runs.again(_changing(makers, samples)) for samples in (1, SAMPLES[0]))
    if same is None or last is None or every is None or not agree(same, runs.plain):
        return False
    is_used = not torch.equal(every, same)
    return agree(last[:-1], runs.plain[:-1]) and (not is_used or not torch.equal(last[-1], same[-1]))


def _changing(makers: Mapping[nn.Module, OwnRows], samples: int) -> dict[nn.Module, OwnRows]:
    return {module: replace(maker, changed=samples) for module, maker in makers.items()}
