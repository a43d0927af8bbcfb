"""What a linear map was given and what came back, position by position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisherscope.adapters.modules import is_linear_map, output_axis
from fisherscope.instrument.batch import IGNORE, Batch
from fisherscope.instrument.data import Labelling
from fisherscope.instrument.targets import Targets
from fisherscope.layout import ModelLayout
from fisherscope.linalg import Factored, PerSampleGradient, Total
from fisherscope.store.position_plan import has_two_sides, side_of


@dataclass(frozen=True)
class ByPosition:
    """The gradient of a linear map's weight as a sum over positions, ``g_i = sum_t d_t a_t'``.

    Attributes:
        gradient: the same, in the orientation of the parameter.
        inputs: a, ``[n, uses * T, in]``.
        output_gradients: d, ``[n, uses * T, out]``.
        attended: which positions are the sample's and no padding, ``[n, T]`` bool.
        uses: how many times the map was called; the T positions of each call come one after the other.
    """

    gradient: Factored
    inputs: Tensor
    output_gradients: Tensor
    attended: Tensor
    uses: int

    @property
    def terms(self) -> Tensor:
        """Which terms of the sum are no padding, ``[n, uses * T]`` bool."""
        return self.attended.repeat(1, self.uses)


@dataclass(frozen=True)
class NotByPosition:
    """Why a parameter's gradient is no sum over the positions of a sample.

    Attributes:
        reason: in words that go behind a colon.
        is_linear_map: whether it is the weight of one all the same.
    """

    reason: str
    is_linear_map: bool


class LinearMaps:
    """Which instrumented parameters are weights of linear maps, and which way round."""

    def __init__(self, targets: Targets, layout: ModelLayout, labelling: Labelling) -> None:
        """Look at the modules; nothing is run.

        Args:
            targets: the instrumented modules.
            layout: of the model.
            labelling: what labels stand beside; those of a "decoder" say which of its positions count.
        """
        self._layout = layout
        self._labelling = labelling
        self._axes: dict[str, int] = {}
        self._modules: dict[str, nn.Module] = {}
        for site in targets.sites:
            if "weight" in site.parameters and is_linear_map(site.module):
                self._axes[site.parameters["weight"]] = output_axis(site.module)
                self._modules[site.parameters["weight"]] = site.module

    @property
    def output_axes(self) -> Mapping[str, int]:
        """The axis over output features of each parameter that is the weight of a linear map."""
        return self._axes

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The linear map of each such parameter."""
        return self._modules

    def split(self, parameter: str, gradient: PerSampleGradient, batch: Batch) -> ByPosition | NotByPosition:
        """The factors of a gradient with their positions, or why there are none."""
        axis = self._axes.get(parameter)
        if axis is None:
            return NotByPosition("not the weight of a single linear map", False)
        if not isinstance(gradient, Factored):
            tied = isinstance(gradient, Total)
            why = "it is also used as a table" if tied else "its gradients are not formed by position"
            return NotByPosition(why, True)
        attended = self._attended(parameter, batch)
        if attended is None:
            return NotByPosition("whose positions its layer sees is not known", True)
        positions, expected = gradient.positions, attended.shape[1]
        is_outside = self._layout.parameter(parameter).layer < 0
        if is_outside and positions == 1:
            attended, expected = attended.new_ones(len(batch), 1), 1  # sees one vector per sample
        if not expected or positions % expected or (is_outside and positions != expected):
            why = f"its layer sees {positions} positions of samples that have {expected}"
            return NotByPosition(why, True)
        left, right = gradient.left, gradient.right
        d, a = (left, right) if axis == 0 else (right, left)
        return ByPosition(gradient, a, d, attended.to(gradient.device), positions // expected)

    def _attended(self, parameter: str, batch: Batch) -> Tensor | None:
        """Which positions of its layer are no padding, ``[n, T]`` bool; None where that is not known."""
        side = side_of(self._layout, parameter)
        is_decoder = self._labelling == "decoder"
        if side == "input" and (has_two_sides(self._layout) or not is_decoder):
            return _of_input(batch)
        # without labels beside its positions nothing says which positions of a decoder count
        return _of_target(batch) if side == "target" and is_decoder else None


def _of_input(batch: Batch) -> Tensor:
    if batch.pixels is not None:
        return torch.ones(len(batch), batch.positions, dtype=torch.bool, device=batch.pixels.device)
    return batch.attention_mask.bool()


def _of_target(batch: Batch) -> Tensor:
    """Positions up to the last one that bears loss: those behind it are padding, or change nothing."""
    bears_loss = batch.labels != IGNORE
    return bears_loss.flip(1).cumsum(1).flip(1) > 0
