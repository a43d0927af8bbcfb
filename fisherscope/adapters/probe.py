"""The numeric check of a layout: perturb one head of one block and watch which head's context moves.

Random *outputs* take the place of the projections' own, so no weight is touched, no copy is made, and pruned
or saturated heads are seen to act like others. All perturbations run in one forward pass, one batch row each,
which stops at the O projection's input.
In a causal model position 0 attends to itself alone, which tells the three roles apart: changing the query
there changes nothing, the key changes later positions only, the value changes position 0 too.
Where a norm over all heads ties the heads of a block, turning a head's output around leaves the norm as it is
and moves that head alone; a loud output drowns all other heads. Loud outputs also show ties nobody declared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fisherscope.errors import AdapterError
from fisherscope.layout import AttentionLayout, HeadBlock, ModelLayout

_POSITIONS = 5
_DRAWS = 8


class _ContextCaptured(Exception):  # noqa: N818 - control flow, never seen outside
    """Ends the forward pass once the context is known."""


@dataclass(frozen=True)
class _Perturbation:
    block: HeadBlock
    head: int
    position: int
    change: Literal["added", "turned", "loud"] = "added"

    @property
    def path(self) -> str:
        """The projection whose output is perturbed."""
        return self.block.weight.parameter.rpartition(".")[0]

    def apply(self, row: Tensor, generator: torch.Generator) -> None:
        """Change the head's entries of one row of the projection's output, ``[positions, features]``."""
        start, width = self.block.weight.starts[self.head], self.block.weight.width
        entries = row[self.position, start : start + width]
        if self.change == "turned":
            entries.copy_(entries.flip(0))
        else:
            scale = 2.0 if self.change == "added" else 4.0 * math.sqrt(self.block.heads)
            entries += scale * torch.randn(width, generator=generator)


def verify_layout(model: nn.Module, layout: ModelLayout, *, every_layer: bool = False) -> None:
    """Confirm every head of Q, K, V and O of the first attention layer of each kind, or of every layer.

    Layers are of one kind when their blocks have the same shapes and heads. Nothing in the model changes.

    Raises:
        AdapterError: another head moved than the layout says; the message tells which.
    """
    seen = set()
    for attention in layout.attention:
        kind = (
            tuple((b.name, b.weight.shape, b.weight.starts, b.weight.width) for b in attention.blocks),
            attention.coupled,
        )
        if every_layer or kind not in seen:
            seen.add(kind)
            _verify_layer(model, layout.model_type, attention)


def _verify_layer(model: nn.Module, model_type: str, attention: AttentionLayout) -> None:
    where = f"the layout of {model_type!r} is wrong at {attention.module}"
    for block in attention.blocks:
        bias = block.bias
        if bias is not None and (bias.starts, bias.width) != (block.weight.starts, block.weight.width):
            raise AdapterError(f"{where}: the bias of {block.name} is cut differently from its weight")
    perturbations = list(_perturbations(attention))
    moved: Tensor | None = None
    problems: list[str] = []
    for draw in range(_DRAWS):
        # a saturated softmax can hide a movement but not invent one, so what moved in any draw counts
        changed = _moved(_run(model, attention, perturbations, seed=draw), attention)
        changed = _joined(changed, perturbations, attention)
        moved = changed if moved is None else moved | changed
        judged = (_judge(p, c, attention) for p, c in zip(perturbations, moved, strict=True))
        problems = [problem for problem in judged if problem]
        if not problems:
            return
    raise AdapterError(f"{where}: {problems[0]}")


def _perturbations(attention: AttentionLayout) -> Iterator[_Perturbation]:
    """Pairs of a moderate and a loud change."""
    for name, positions in (("Q", (0, _POSITIONS - 1)), ("K", (0,)), ("V", (0,))):
        block = attention.block(name)
        if name in attention.coupled and block.weight.width == 1:
            raise AdapterError(f"{attention.module}: coupled heads of width 1 cannot be told apart")
        for head in range(block.heads):
            for position in positions:
                yield _Perturbation(block, head, position, "turned" if name in attention.coupled else "added")
                yield _Perturbation(block, head, position, "loud")


def _joined(changed: Tensor, perturbations: list[_Perturbation], attention: AttentionLayout) -> Tensor:
    """One verdict for a moderate and a loud change of one head, which without coupling move the same.

    Models scale scores differently: the moderate one may be too weak for low precision, the loud one
    saturate the softmax.
    """
    joined = changed.clone()
    for row in range(0, len(perturbations), 2):
        if perturbations[row].block.name not in attention.coupled:
            joined[row : row + 2] = changed[row] | changed[row + 1]
    return joined


def _judge(perturbation: _Perturbation, changed: Tensor, attention: AttentionLayout) -> str | None:
    """What is wrong with the heads that moved, ``changed [positions, heads]``; None if nothing is."""
    name, head = perturbation.block.name, perturbation.head
    if name == "Q" and perturbation.position == 0:
        if changed.any():
            return f"what is called Q head {head} acts on other positions as a key or value does"
        return None
    if name in attention.coupled and perturbation.change == "loud":
        expected = set(range(attention.n_heads))
    elif name == "Q":
        expected = {head}
    else:
        expected = {h for h in range(attention.n_heads) if attention.kv_head(h) == head}
    found = {int(h) for h in changed.any(0).nonzero().flatten()}
    if found != expected:
        return f"perturbing {name} head {head} moved heads {sorted(found)}, not {sorted(expected)}"
    if name == "K" and changed[0].any():
        return f"what is called K head {head} changes the first position, as a value does"
    if name == "V" and not changed[0].any():
        return f"what is called V head {head} leaves the first position alone, as a key does"
    return None


def _moved(context: Tensor, attention: AttentionLayout) -> Tensor:
    """Which heads' context moved at which positions, ``[perturbations, positions, heads]``."""
    output = attention.block("O").weight
    columns = [slice(start, start + output.width) for start in output.starts]
    difference = (context[1:] - context[:1]).abs()
    per_head = torch.stack([difference[..., c].amax(-1) for c in columns], -1)
    tolerance = max(1.5 * torch.finfo(context.dtype).eps, 1e-4)
    return per_head > tolerance * context.abs().max()


def _run(
    model: nn.Module, attention: AttentionLayout, perturbations: list[_Perturbation], seed: int
) -> Tensor:
    """Contexts (inputs of the O projection) of a plain row followed by one row per perturbation."""
    captured: list[Tensor] = []

    def capture(_module: nn.Module, args: tuple[Any, ...]) -> None:
        captured.append(args[0].detach())
        raise _ContextCaptured

    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, embeddings.num_embeddings, (1, _POSITIONS), generator=generator)
    ids = ids.to(embeddings.weight.device).expand(1 + len(perturbations), -1)
    by_module: dict[str, list[tuple[int, _Perturbation]]] = {}
    for row, perturbation in enumerate(perturbations, start=1):
        by_module.setdefault(perturbation.path, []).append((row, perturbation))
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.no_grad())
        for path, mine in by_module.items():
            handle = model.get_submodule(path).register_forward_hook(_perturb(mine, generator))
            stack.callback(handle.remove)
        handle = model.get_submodule(attention.output).register_forward_pre_hook(capture)
        stack.callback(handle.remove)
        stack.enter_context(suppress(_ContextCaptured))
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    if not captured:
        raise AdapterError(f"{attention.output} was never called: it is not the O projection")
    return captured[0]


def _perturb(
    mine: list[tuple[int, _Perturbation]], generator: torch.Generator
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """A forward hook that gives all rows the same random output, and each row its perturbation."""

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        noise = torch.randn(output.shape[1:], generator=generator)
        out = noise.repeat(output.shape[0], 1, 1)
        for row, p in mine:
            p.apply(out[row], generator)
        return out.to(output)

    return hook


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
