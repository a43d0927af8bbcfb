"""Proving a batch: one ordinary backward pass of randomly weighted losses, against our per-sample gradients.

``sum_i w_i g_i`` is the gradient of ``sum_i w_i L_i``, which autograd finds without any of this package's
hooks, rules and products. The weights are ``+-2^k / |g_i|`` to a power of two: powers of two pass exactly
through a backward pass, dividing by the norms keeps loud samples from hiding quiet ones, and unequal k show
samples that were exchanged. What is compared are random projections, group by group, relative to
``sqrt(sum_i w_i^2 |g_i|^2)``: the sum itself cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fisherscope.instrument.checking.witness import Projected, Witness, project, theta_norms
from fisherscope.instrument.squares import Sinks, measure
from fisherscope.layout import Member
from fisherscope.linalg import Dense

FLOOR = 1e-2
"""Groups whose gradients are smaller than this share of the whole are judged as if they had that share."""

_LARGEST_POWER = 3
_LARGEST_EXPONENT = 120  # float32 holds no more


@dataclass(frozen=True)
class Tolerance:
    """The largest relative deviation that is taken for rounding.

    Attributes:
        linear: of sums of gradients of matrices, and of their products with the parameter.
        vector: of those of biases and gains, where rounding has few entries to even out over.
        square: of sums of squares.
    """

    linear: float
    vector: float
    square: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> Tolerance:
        """For passes whose coarsest numbers have this dtype."""
        is_fine = torch.finfo(dtype).eps <= torch.finfo(torch.float32).eps
        return cls(1e-5, 1e-5, 1e-4) if is_fine else cls(1.5e-2, 3e-2, 5e-2)


@dataclass(frozen=True)
class Deviation:
    """How far one parameter's gradients are from autograd's, at the worst of its groups.

    Attributes:
        parameter: its name.
        what: "gradients", "products with the parameter" or "squares".
        size: relative to what the samples' gradients add up to.
        tolerance: what it may be.
    """

    parameter: str
    what: str
    size: float
    tolerance: float

    @property
    def excess(self) -> float:
        """How many times the tolerance it is."""
        return self.size / self.tolerance


def draw_weights(norms: Tensor, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random weights ``+-2^(k - round log2 |g_i|)``, k from 0 to 3, ``[n]`` float64.

    In float16 the gradients of activations reach the ends of its range, where a power of two does not pass
    exactly: there only signs are drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(norms)
    signs = torch.randint(0, 2, (n,), generator=generator, dtype=torch.int64, device="cpu") * 2 - 1
    powers = torch.randint(0, _LARGEST_POWER + 1, (n,), generator=generator, dtype=torch.int64, device="cpu")
    if dtype == torch.float16:
        return signs.double()
    sizes = torch.where(norms > 0, norms, 1.0).log2().round()
    return signs * torch.exp2((powers - sizes).clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT))


def smallest_seen(weights: Tensor, norms: Tensor, tolerance: Tolerance) -> float:
    """The smallest error of any one sample's gradient, relative to that gradient, that would not pass."""
    sizes = (weights * norms).abs()
    sizes = sizes[sizes > 0]
    return float(tolerance.linear * sizes.square().sum().sqrt() / sizes.min()) if len(sizes) else 0.0


@dataclass
class Comparison:
    """Compares one backward pass of weighted losses with what a witness has seen, parameter by parameter.

    Attributes:
        witness: of the same backward pass.
        parameters: names and values.
        weights: of the samples' losses, ``[n]`` float64.
        tolerance: what is taken for rounding.
        deviations: the worst of each parameter so far.
    """

    witness: Witness
    parameters: Mapping[str, nn.Parameter]
    weights: Tensor
    tolerance: Tolerance
    deviations: list[Deviation] = field(default_factory=list)
    _found: dict[str, list[Tensor]] = field(default_factory=dict)
    _dots: dict[str, list[Tensor]] = field(default_factory=dict)

    def take(self, name: str, gradient: Tensor) -> None:
        """Take a part of a parameter's gradient; autograd gives that of a checkpointed use in parts."""
        gradient = _strided(gradient)
        seen = self.witness.projected[name]
        vectors = self.witness.vectors(name, tuple(gradient.shape), seen.members, gradient.device)
        parts = [project(gradient, vector, axis).double() for axis, vector in vectors]
        dots = self._products(name, gradient, seen.members)
        self._found[name] = _added(self._found.get(name), parts)
        self._dots[name] = _added(self._dots.get(name), dots)

    def _products(self, name: str, gradient: Tensor, members: tuple[Member, ...]) -> list[Tensor]:
        theta = self.parameters[name].detach().float()
        found = Dense(gradient.unsqueeze(0)).dots(theta, [member.partition for member in members])
        return [values[0].double() for values in found]

    def finish(self) -> None:
        """Judge every parameter of the witness; one without a gradient has one of zero."""
        whole = float((self.weights * self.witness.norms()).square().sum())
        for name, seen in self.witness.projected.items():
            self._judge(name, seen, whole)

    def _judge(self, name: str, seen: Projected, whole: float) -> None:
        weights = self.weights.to(next(iter(seen.by_axis.values())).device)
        found = self._found.get(name) or [torch.zeros((), dtype=torch.float64, device=weights.device)] * 9
        wrong = {
            axis: ((weights @ values.double()) - reference).square()
            for (axis, values), reference in zip(seen.by_axis.items(), found, strict=False)
        }
        size, product = 0.0, 0.0
        theta = theta_norms(self.parameters[name], seen.members)
        for k, member in enumerate(seen.members):
            scale = (weights.square() @ seen.squares[k] + FLOOR**2 * whole).sqrt()
            along = [member.partition.axis] if member.partition is not None else list(wrong)
            for axis in along:
                pieces = wrong[axis] if member.partition is None else member.partition.sums(wrong[axis])
                error = (pieces.sum(0, keepdim=True) if member.partition is None else pieces).sqrt()
                size = max(size, _largest(error, scale))
            dots = self._dots[name][k] if name in self._dots else torch.zeros_like(scale)
            off = (weights @ seen.dots[k] - dots).abs()
            product = max(product, _largest(off, scale * theta[k]))
        limit = self.tolerance.vector if self.parameters[name].dim() == 1 else self.tolerance.linear
        self.deviations.append(Deviation(name, "gradients", size, limit))
        self.deviations.append(Deviation(name, "products with the parameter", product, limit))


@dataclass
class SquareComparison:
    """Compares the squares of one sample's gradient, group by group.

    Attributes:
        witness: of the backward pass under the data's labels.
        sample: its place in the batch.
        tolerance: what is taken for rounding.
        deviations: the worst of each parameter.
    """

    witness: Witness
    sample: int
    tolerance: Tolerance
    deviations: list[Deviation] = field(default_factory=list)
    _seen: dict[str, int] = field(default_factory=dict)
    _pending: dict[str, Deviation] = field(default_factory=dict)

    def take(self, name: str, gradient: Tensor) -> None:
        """Take a parameter's gradient; parts of one cannot be squared, and are left out."""
        self._seen[name] = self._seen.get(name, 0) + 1
        seen = self.witness.projected[name]
        whole = float(self.witness.norms()[self.sample]) ** 2
        one = torch.ones(1, dtype=torch.float32, device=gradient.device)
        own = Dense(_strided(gradient).float().unsqueeze(0))
        # whatever its magnitude: float32 holds no square below 1e-38
        found = measure(own, one, [member.partition for member in seen.members], Sinks()).pieces
        size = 0.0
        for k in range(len(seen.members)):
            mine, other = seen.squares[k][self.sample], found[k][0]
            scale = mine + FLOOR**2 * whole
            size = max(size, _largest((mine - other).abs(), scale))
        self._pending[name] = Deviation(name, "squares", size, self.tolerance.square)

    def finish(self) -> None:
        """Judge the parameters whose gradients came whole."""
        self.deviations.extend(d for name, d in self._pending.items() if self._seen[name] == 1)


def backward_with(
    loss: Tensor, parameters: Mapping[str, nn.Parameter], take: Callable[[str, Tensor], None]
) -> None:
    """One backward pass over a graph that stays; each parameter's gradient is handed on and let go at once.

    Parameters gather gradients, as inside of :func:`~fisherscope.instrument.reference.tracked`.
    """
    handles = []
    for name, parameter in parameters.items():

        def hook(parameter: Tensor, name: str = name) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                take(name, gradient)

        handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
    try:
        # as in our own pass: the user's autocast is for the forward pass
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()


def worst(deviations: Sequence[Deviation]) -> Deviation:
    """The one that is furthest beyond what it may be."""
    return max(deviations, key=lambda deviation: deviation.excess)


def _largest(errors: Tensor, scale: Tensor) -> float:
    """The largest error relative to its scale, 0 for none.

    Nothing on either side is agreement; what is not finite is none, and counts as infinite.
    """
    relative = torch.where(errors == 0, 0.0, errors / scale)
    return float(relative.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) if errors.numel() else 0.0


def _strided(gradient: Tensor) -> Tensor:
    """An embedding with ``sparse=True`` has a sparse gradient."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def _added(known: list[Tensor] | None, more: list[Tensor]) -> list[Tensor]:
    return more if known is None else [a + b for a, b in zip(known, more, strict=True)]
