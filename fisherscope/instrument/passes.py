"""One batch: a forward pass, one backward pass, and every quantity of every parameter.

Only quantities of other labels than the data's take further backward passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fisherscope.adapters.modules import output_axis
from fisherscope.errors import FisherscopeError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.by_position import LinearMaps
from fisherscope.instrument.checking.gradient_hooks import watching_gradient_hooks
from fisherscope.instrument.checking.witness import Witness
from fisherscope.instrument.checks import check_losses
from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions.base import Collector, Context
from fisherscope.instrument.hooks import GradientTap
from fisherscope.instrument.label_sources import draws, number_of_draws
from fisherscope.instrument.objectives import Objective, Predictions
from fisherscope.instrument.squares import Sinks
from fisherscope.instrument.targets import Targets
from fisherscope.layout import GroupTable
from fisherscope.linalg import Dense, PerSampleGradient
from fisherscope.linalg.normalization import factors
from fisherscope.store import SegmentWriter


class BatchPass:
    """Runs batches of one model; to be used inside :func:`~fisherscope.instrument.prepared.prepared`.

    Attributes:
        model: the model.
        linear_maps: which parameters are weights of linear maps.
        dtype: in which rules multiply.
        seed: of what is drawn at random.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        objective: Objective,
        context: Context,
        compute_dtype: torch.dtype,
        *,
        seed: int = 0,
    ) -> None:
        """Nothing is hooked before :meth:`run`."""
        self.model = model
        self._targets = targets
        self.seed = seed
        self._objective = objective
        self._context = context
        self._tap = GradientTap(
            targets, self._emit, compute_dtype, input_cut=_sites_cut_on_the_input(targets, context.groups)
        )
        self.linear_maps = LinearMaps(targets, context.layout, objective.labelling)
        self.dtype = compute_dtype
        self._collectors: Sequence[Collector] = ()
        self._batch: Batch | None = None
        self._factors = torch.empty(0, dtype=torch.float32, device="cpu")
        self._segment: SegmentWriter | None = None
        self._start = 0
        self._emitted: set[str] = set()

    def computing_in(self, dtype: torch.dtype) -> BatchPass:
        """The same with another compute dtype."""
        return BatchPass(self.model, self._targets, self._objective, self._context, dtype, seed=self.seed)

    def run(
        self,
        batch: Batch,
        collectors: Sequence[Collector],
        segment: SegmentWriter | None = None,
        start: int = 0,
        witnesses: Sequence[Witness] = (),
    ) -> Tensor:
        """Feed the collectors from one backward pass.

        Args:
            batch: the samples.
            collectors: who consumes the gradients.
            segment: where per-sample rows go, None for aggregates alone.
            start: the batch's first row in the segment.
            witnesses: who watches the backward passes for a proof, one for each label source.

        Returns:
            Losses L_i, ``[n]`` float64 on the CPU.
        """
        self._batch = batch
        self._segment, self._start = segment, start
        try:
            return self._run(batch, collectors, {witness.labels: witness for witness in witnesses})
        finally:
            # what a failed pass was doing must not outlive it: accumulators are large
            self._batch, self._collectors, self._segment = None, (), None

    def _run(self, batch: Batch, collectors: Sequence[Collector], witnesses: dict[str, Witness]) -> Tensor:
        watching = [witnesses["data"]] if "data" in witnesses else []
        by_data = [*(collector for collector in collectors if collector.labels == "data"), *watching]
        others = [collector for collector in collectors if collector.labels != "data"]
        for collector in (*collectors, *witnesses.values()):
            collector.begin(len(batch))
        with (
            watching_gradient_hooks(self.model, tensors=False) as changed,
            self._tap.attached(len(batch), *batch.widths),
        ):
            found = self._objective.run(self.model, batch)
            losses = found.losses(len(batch)) if isinstance(found, Predictions) else found
            check_losses(losses, self.model, self._objective, batch)
            self._backward(losses, by_data, self._normalization(batch), keep_graph=bool(others))
            for collector in others:
                self._further_passes(collector, found, batch, witnesses.get(collector.labels))
        changed.refuse()
        for collector in collectors:
            collector.end(self._segment, self._start)
        return losses.detach().double().cpu()

    def _further_passes(
        self, collector: Collector, found: Predictions | Tensor, batch: Batch, witness: Witness | None
    ) -> None:
        """The backward passes of one label source, over the graph that there is."""
        if not isinstance(found, Predictions):
            raise FisherscopeError(
                f"labels={collector.labels!r} needs to know what the model predicts: let the objective "
                "return a fisherscope.Predictions in place of losses"
            )
        normalization = self._normalization(batch)
        per_token = torch.from_numpy(factors(batch.tokens.cpu(), "per_token")).float()
        if witness is not None:
            witness.choose_draw(number_of_draws(collector.labels, found, count=collector.draws))
        passes = draws(collector.labels, found, batch, count=collector.draws, seed=self.seed)
        for number, draw in enumerate(passes):
            weights = per_token if draw.weight is None else normalization * draw.weight**0.5
            watching = [witness] if witness is not None and witness.draw == number else []
            self._backward(draw.losses, [collector, *watching], weights, keep_graph=True)

    def _backward(
        self, losses: Tensor, collectors: Sequence[Collector], weights: Tensor, *, keep_graph: bool
    ) -> None:
        """One backward pass for some collectors, with ``h_i = weights_i g_i``."""
        assert self._batch is not None
        self._collectors, self._factors = collectors, weights
        self._emitted.clear()
        # the products are the rules' own: what the user's autocast is for is the model's forward pass
        with torch.autocast(losses.device.type, enabled=False):
            self._tap.backward(losses.sum(), keep_graph=keep_graph)
        for name in self._context.parameters.keys() - self._emitted:
            # not on the path from the input to the loss: its gradient is zero, and that is a value
            parameter = self._context.parameters[name]
            zeros = torch.zeros(
                len(self._batch), *parameter.shape, device=parameter.device, dtype=torch.float32
            )
            self._emit(name, Dense(zeros))

    def _normalization(self, batch: Batch) -> Tensor:
        return torch.from_numpy(factors(batch.tokens.cpu(), self._context.normalization)).float()

    def forward(self, batch: Batch) -> Predictions | Tensor:
        """The forward pass alone, with all that it keeps for a backward pass."""
        with self._tap.attached(len(batch), *batch.widths):
            return self._objective.run(self.model, batch)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Names and values of the instrumented parameters."""
        return self._context.parameters

    @property
    def device(self) -> torch.device:
        """Where accumulators live."""
        return self._context.device

    @property
    def called(self) -> frozenset[str]:
        """Paths of the watched modules that the last batch called."""
        return self._tap.called

    @property
    def coarsest(self) -> torch.dtype:
        """The coarsest dtype of what the watched layers of the last batch gave, and of the products."""
        return max(self._tap.dtypes | {self.dtype}, key=lambda dtype: torch.finfo(dtype).eps)

    def _emit(self, name: str, gradient: PerSampleGradient) -> None:
        if self._batch is None:
            raise RuntimeError("a gradient arrived outside a batch")
        self._emitted.add(name)
        emission = Emission(
            parameter=name,
            batch=self._batch,
            gradient=gradient,
            theta=self._context.parameters[name].detach().to(self.dtype),
            members=self._context.groups.members[name],
            factors=self._factors.to(gradient.device),
            sinks=_only(collector.sinks(name) for collector in self._collectors),
            want_dense=any(collector.wants_dense(name) for collector in self._collectors),
            linear_maps=self.linear_maps,
        )
        for collector in self._collectors:
            collector.update(emission, self._segment, self._start)


def _sites_cut_on_the_input(targets: Targets, groups: GroupTable) -> list[str]:
    """Sites with heads or channels along the weight's input features."""
    found = []
    for site in targets.sites:
        partitions = [m.partition for name in site.parameters.values() for m in groups.members[name]]
        along_inputs = 1 - output_axis(site.module)
        if any(p is not None and len(p.shape) == 2 and p.axis == along_inputs for p in partitions):
            found.append(site.path)
    return found


def _only(offered: Iterable[Sinks]) -> Sinks:
    """The sinks of the one collector that has any."""
    filled = [s for s in offered if not s.is_empty]
    if len(filled) > 1:
        raise RuntimeError("two collectors accumulate squares of one parameter: one pass can fill only one")
    return filled[0] if filled else Sinks()
