"""What is said where a batch does not pass its proof: which samples, which module, and likely causes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fisherscope.adapters.modules import has_replaced_forward
from fisherscope.errors import CoverageError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.checking.proof import Deviation, Tolerance
from fisherscope.instrument.checking.witness import Witness, project
from fisherscope.instrument.coupling import first_coupled_module
from fisherscope.instrument.objectives import Objective
from fisherscope.instrument.passes import BatchPass

_SHOWN = 5
_ALIKE = 0.2  # of the largest deviation: what is beyond that deviates likewise


def refuse_other_losses(
    model: nn.Module, objective: Objective, batch: Batch, ours: Tensor, other: Tensor, tolerance: Tolerance
) -> None:
    """The same batch has the same losses when it is run again.

    Raises:
        CoverageError: it has not.
    """
    first, second = ours.detach().double().cpu(), other.detach().double().cpu()
    wrong = (first - second).abs() > tolerance.linear * (first.abs() + 1.0)
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        where = first_coupled_module(model, objective, batch, batch) or "the loss itself"
        raise CoverageError(
            f"the loss of {batch.sample_id(i)} is {float(first[i]):.6g} with the layers watched and "
            f"{float(second[i]):.6g} without, in the same batch and from the same random state: the model "
            f"does not repeat itself, or it notices that it is watched. The first to differ is {where}; make "
            "it repeatable, or leave its parameters out with parameters=[...]"
        )


def explain(
    batch_pass: BatchPass, batch: Batch, losses: Tensor, witness: Witness, found: Sequence[Deviation]
) -> str:
    """The message of a proof that failed.

    Args:
        batch_pass: what ran the batch.
        batch: the samples.
        losses: of an ordinary forward pass whose graph is still there, ``[n]``.
        witness: what our pass found.
        found: every deviation.
    """
    wrong = sorted((d for d in found if d.excess > 1), key=lambda deviation: -deviation.excess)
    worst, names = wrong[0], list(dict.fromkeys(deviation.parameter for deviation in wrong))
    path, _, _ = worst.parameter.rpartition(".")
    samples = _deviating(batch_pass, batch, losses, witness, worst)
    causes = list(_causes(batch_pass.model.get_submodule(path), path))
    return (
        f"the {worst.what} of {samples} with respect to {_shown(names, 'parameters')} are not what autograd "
        "finds: an ordinary backward pass of the same batch, with random weights, is off by "
        f"{worst.size:.2g}, and {worst.tolerance:.0e} would be rounding. Nothing of this batch is stored. "
        f"{' '.join(causes)} Leave these parameters out with parameters=[...] (scope.coverage() lists the "
        "names), or see whether batch_size=1 agrees; force=True goes on with a warning"
    )


def _shown(names: Sequence[str], what: str) -> str:
    more = f", ... ({len(names)} {what})" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _deviating(
    batch_pass: BatchPass, batch: Batch, losses: Tensor, witness: Witness, worst: Deviation
) -> str:
    """The samples whose own gradients differ, by a backward pass for each."""
    name, sizes = worst.parameter, []
    parameter, seen = batch_pass.parameters[name], witness.projected[name]
    axis, vector = next(witness.vectors(name, tuple(parameter.shape), seen.members, parameter.device))
    try:
        for i in range(len(batch)):
            (gradient,) = torch.autograd.grad(losses[i], [parameter], retain_graph=True, allow_unused=True)
            dense = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
            mine, other = seen.by_axis[axis][i].double(), project(dense, vector, axis).double()
            sizes.append(float((mine - other).norm() / (mine.norm() + other.norm()).clamp_min(1e-300)))
    except RuntimeError:  # parts that are checkpointed in the older way know no gradient of one parameter
        sizes = [1.0] * len(batch)
    wrong = [batch.sample_id(i) for i, size in enumerate(sizes) if size > _ALIKE * max(sizes)]
    return _shown(wrong or [batch.sample_id(i) for i in range(len(batch))], "samples")


def _causes(module: nn.Module, path: str) -> Iterator[str]:
    """What may be the reason, as far as it shows."""
    if has_replaced_forward(module):
        yield f"Somebody has replaced the forward of {path}."
    every = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    hooks = [hook for hook in every if not str(getattr(hook, "__module__", "")).startswith("fisherscope.")]
    if hooks:
        yield f"There are {len(hooks)} hooks on {path}."
    if hasattr(module, "parametrizations"):
        yield f"The weights of {path} are computed (torch.nn.utils.parametrize)."
    yield "Usual causes: a weight that is used around its layer's call, a rule that does not fit its layer."
