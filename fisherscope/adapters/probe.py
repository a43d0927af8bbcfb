"""The numeric check of a layout: perturb one head of one block and watch which head's context moves.

Random *outputs* take the place of the projections' own, so no weight is touched, no copy is made, and pruned
or saturated heads are seen to act like others. All perturbations run in one forward pass, one batch row each,
which stops at the O projection's input.

The roles are told apart in any model, causal or not. A query changes the context of its own position alone; a
key or a value changes that of other positions. Where all values are zero the context is zero: there queries
and keys change nothing. Where the query projection also gates the context, all keys are zero once: then
queries change nothing, and gates do.

Where a norm over all heads ties the heads of a block, exchanging entries of one head leaves the norm as it is
and moves that head alone; a loud output drowns all other heads. Loud outputs also show ties nobody declared.
A single entry of a query or key must move the whole context of its heads: it does not where two heads were
taken for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fisherscope.adapters.capture import beyond_rounding, capture_input, projection_of
from fisherscope.adapters.channels import verify_channels
from fisherscope.adapters.places import check_places
from fisherscope.errors import AdapterError
from fisherscope.layout import AttentionLayout, HeadBlock, MlpLayout, ModelLayout, Partition

_DRAWS = 8

Change = Literal["added", "loud", "entry"]
Silent = Literal["", "V", "K"]


@dataclass(frozen=True)
class _Perturbation:
    """One batch row: what is changed in it, and which block is silent in the whole row.

    Queries are changed at the last position, which sees others, and keys at the first, which others see;
    values there and, since a saturated softmax may not look there, at all positions (``at`` None).
    """

    block: HeadBlock
    head: int
    change: Change
    silent: Silent
    coupled: bool
    at: int | None

    @property
    def path(self) -> str:
        """The projection whose output is perturbed."""
        return projection_of(self.block.weight)

    @property
    def is_of_one_value(self) -> bool:
        """Whether a value is changed at one position: that shows its role, but perhaps not in all heads."""
        return self.block.name == "V" and self.at is not None

    def apply(self, row: Tensor, generator: torch.Generator) -> None:
        """Change the head's entries of one row of the projection's output, ``[positions, features]``."""
        start, width = self.block.weight.starts[self.head], self.block.weight.width
        for position in range(len(row)) if self.at is None else (self.at,):
            self._change(row[position, start : start + width], width, generator)

    def _change(self, entries: Tensor, width: int, generator: torch.Generator) -> None:
        if self.change == "entry":
            if self.coupled:
                # half of the head keeps its norm; where heads were taken for one it lies in the first of them
                half = entries[: max(2, width // 2)]
                half.copy_(half.flip(0))
            else:
                entries[0] += 4.0 * math.sqrt(width)
        elif self.coupled and self.change == "added":
            entries.copy_(entries.flip(0))
        else:
            scale = 2.0 if self.change == "added" else 4.0 * math.sqrt(self.block.heads)
            entries += scale * torch.randn(width, generator=generator, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class _Problem:
    """What is wrong; final if something moved that must not, which no other draw can mend."""

    message: str
    is_final: bool


@dataclass(frozen=True)
class _Movement:
    """What moved in the context, in any draw.

    Attributes:
        heads: ``[perturbations, positions, heads]``.
        tails: ``[perturbations, heads]``: the second half of each head's context.
    """

    heads: Tensor
    tails: Tensor

    def __or__(self, other: _Movement) -> _Movement:
        return _Movement(self.heads | other.heads, self.tails | other.tails)


def verify_layout(model: nn.Module, layout: ModelLayout, *, every_layer: bool = False) -> None:
    """Confirm every head of Q, K, V and O, and channels, of the first layer of each kind, or of all.

    Layers are of one kind when their parts have the same shapes, heads and couplings. Nothing in the model
    changes.

    Raises:
        AdapterError: another head or channel moved than the layout says; the message tells which.
    """
    seen: set[Any] = set()
    parts: list[AttentionLayout | MlpLayout] = [*layout.attention, *layout.mlps]
    for part in parts:
        kind = _kind_of(part)
        if not every_layer and kind in seen:
            continue
        seen.add(kind)
        try:
            if isinstance(part, AttentionLayout):
                verify_attention(model, part)
            else:
                verify_channels(model, part)
        except AdapterError as error:
            raise AdapterError(
                f"the layout of {layout.model_type!r} is wrong at {part.module}: {error}"
            ) from None


def _kind_of(part: AttentionLayout | MlpLayout) -> tuple[Any, ...]:
    """What layers have in common that one check is enough for, unless all are asked for."""
    if isinstance(part, MlpLayout):
        return (part.stack, *((p.shape, p.axis, p.starts) for p in part.partitions))
    blocks = ((b.name, b.weight.shape, b.weight.starts, b.weight.width) for b in part.blocks)
    return (part.stack, part.coupled, *blocks)


def verify_attention(model: nn.Module, attention: AttentionLayout) -> None:
    """Confirm every head of one attention layer.

    Raises:
        AdapterError: another head moved than the layout says; the message tells which.
    """
    for block in attention.blocks:
        if block.name in attention.coupled and block.weight.width == 1:
            raise AdapterError(f"coupled heads of width 1 cannot be told apart in {block.name}")
    projected = [b for b in attention.blocks if b.name in {"Q", "gate", "K", "V"}]
    check_places(model, attention)
    perturbations = list(_perturbations(attention, projected))
    with _sinks(model, attention, None):
        # one head of each block is enough to refuse most wrong layouts
        _confirm(model, attention, [p for p in perturbations if p.head == 0])
        _confirm(model, attention, perturbations)
    if attention.has("sink"):
        _verify_sinks(model, attention)


def is_causal(model: nn.Module, attention: AttentionLayout) -> bool:
    """Whether no position sees the last one but itself."""
    value = attention.block("V" if attention.has("V") else "K")
    last = _Perturbation(value, 0, "loud", "", coupled=False, at=-1)
    return not any(
        _moved(_contexts(model, attention, [last], seed=draw), attention, [last]).heads[0, :-1].any()
        for draw in range(_DRAWS)
    )


def _confirm(model: nn.Module, attention: AttentionLayout, perturbations: Sequence[_Perturbation]) -> None:
    moved: _Movement | None = None
    problem: _Problem | None = None
    for draw in range(_DRAWS):
        # a saturated softmax can hide a movement but not invent one, so what moved in any draw counts
        found = _moved(_contexts(model, attention, perturbations, seed=draw), attention, perturbations)
        moved = found if moved is None else moved | found
        problem = _first_problem(attention, perturbations, moved)
        if problem is None:
            return
        if problem.is_final:
            break
    assert problem is not None
    raise AdapterError(problem.message)


def _perturbations(attention: AttentionLayout, blocks: Sequence[HeadBlock]) -> Iterator[_Perturbation]:
    for block in blocks:
        coupled = block.name in attention.coupled
        for head in range(block.heads):
            at = {"V": None, "K": 0}.get(block.name, -1)
            for silent in _silences(attention, block):
                for change in ("added", "loud"):
                    yield _Perturbation(block, head, change, silent, coupled, at)
            if block.name in {"Q", "K"} and block.weight.width > 1:
                yield _Perturbation(block, head, "entry", "", coupled, at)
            if block.name == "V":
                yield _Perturbation(block, head, "loud", "", coupled, 0)


def _silences(attention: AttentionLayout, block: HeadBlock) -> Iterator[Silent]:
    yield ""
    if block.name != "V" and attention.has("V"):
        yield "V"
    if block.name in {"Q", "gate"} and attention.has("gate"):
        yield "K"


def _first_problem(
    attention: AttentionLayout, perturbations: Sequence[_Perturbation], moved: _Movement
) -> _Problem | None:
    """What is wrong with the heads that moved, first of all what no other draw can mend; None if nothing is.

    A moderate and a loud change of one head, which without coupling move the same, have one verdict: models
    scale scores differently, so that the moderate one may be too weak for low precision and the loud one
    saturate the softmax.
    """
    problems: list[_Problem] = []
    elsewhere: dict[str, bool] = {}
    for row, perturbation in enumerate(perturbations):
        heads, tails = moved.heads[row], moved.tails[row]
        if perturbation.change == "loud" and not perturbation.coupled and not perturbation.is_of_one_value:
            continue
        if perturbation.change == "added" and not perturbation.coupled:
            heads = heads | moved.heads[row + 1]
        name = perturbation.block.name
        if name in {"K", "V"} and not perturbation.silent and perturbation.at is not None:
            others = heads.any(1)
            others[perturbation.at] = False
            elsewhere[name] = elsewhere.get(name, False) or bool(others.any())
        problem = _judge(perturbation, heads, tails, attention)
        if problem is not None and problem.is_final:
            return problem
        if problem is not None:
            problems.append(problem)
    for name, acts in elsewhere.items():
        if not acts:
            problems.append(
                _Problem(f"what is called {name} changes its own position alone, as a query does", False)
            )
    return problems[0] if problems else None


def _judge(p: _Perturbation, moved: Tensor, tails: Tensor, attention: AttentionLayout) -> _Problem | None:
    """What is wrong with what one perturbation moved, ``moved [positions, heads]``, ``tails [heads]``."""
    name, head = p.block.name, p.head
    found = {int(h) for h in moved.any(0).nonzero().flatten()}
    if p.silent == "V" or (p.silent == "K" and name == "Q"):
        role = "a value" if p.silent == "V" else "a gate"
        return _Problem(f"what is called {name} head {head} acts as {role} does", True) if found else None
    mine = attention.query_heads(head) if name in {"K", "V"} else (head,)
    expected = set(range(attention.n_heads)) if p.coupled and p.change == "loud" else set(mine)
    if found != expected and not (p.is_of_one_value and found <= expected):
        message = f"perturbing {name} head {head} moved heads {sorted(found)}, not {sorted(expected)}"
        # a context is a mean of values: if changing all of them moves nothing, they are not values
        return _Problem(message, is_final=not found <= expected or (name == "V" and not found))
    if name not in {"K", "V"} and p.at is not None:
        others = moved.any(1)
        others[p.at] = False
        if others.any():
            message = f"what is called {name} head {head} acts on other positions as a key or value does"
            return _Problem(message, is_final=True)
    if p.change == "entry" and not tails[sorted(mine)].all():
        message = f"one entry of {name} head {head} moved a part of the head's context: it is several heads"
        return _Problem(message, is_final=False)
    return None


def _moved(context: Tensor, attention: AttentionLayout, perturbations: Sequence[_Perturbation]) -> _Movement:
    """Compare each row with the plain row that has the same block silent."""
    block = attention.block("O").weight
    plain = {"": 0, "V": 1, "K": 2}
    references = context[[plain[p.silent] for p in perturbations]]
    moved = beyond_rounding(context[len(plain) :], references)
    columns = [slice(start, start + block.width) for start in block.starts]
    heads = torch.stack([moved[..., c].any(-1) for c in columns], -1)
    # where two or more heads were taken for one, the first of them ends before the middle
    halves = [slice((c.start + c.stop) // 2, c.stop) for c in columns]
    tails = torch.stack([moved[..., half].any(-1).any(-1) for half in halves], -1)
    return _Movement(heads, tails)


def _contexts(
    model: nn.Module, attention: AttentionLayout, perturbations: Sequence[_Perturbation], seed: int
) -> Tensor:
    """Contexts (inputs of O) of three plain rows, with nothing, V or K silent, and of each perturbation."""
    silences: list[Silent] = ["", "V", "K", *(p.silent for p in perturbations)]
    generator = torch.Generator().manual_seed(seed)
    quiet: dict[str, list[tuple[int, Partition]]] = {}
    for row, silent in enumerate(silences):
        if silent and attention.has(silent):
            weight = attention.block(silent).weight
            quiet.setdefault(projection_of(weight), []).append((row, weight))
    mine: dict[str, list[tuple[int, _Perturbation]]] = {}
    for row, perturbation in enumerate(perturbations, start=len(silences) - len(perturbations)):
        mine.setdefault(perturbation.path, []).append((row, perturbation))

    def change(path: str) -> Callable[[Tensor], None]:
        def apply(out: Tensor) -> None:
            for row, weight in quiet.get(path, ()):
                for start in weight.starts:
                    out[row, :, start : start + weight.width] = 0
            for row, perturbation in mine.get(path, ()):
                perturbation.apply(out[row], generator)

        return apply

    changes = {path: change(path) for path in dict.fromkeys([*mine, *quiet])}
    return capture_input(model, attention.output, changes, len(silences), generator, "the O projection")


def _verify_sinks(model: nn.Module, attention: AttentionLayout) -> None:
    """A head's sink takes attention away from that head alone."""
    columns = attention.block("O").weight
    with _sinks(model, attention, None):
        plain = _contexts(model, attention, [], seed=0)[:1]
    for head in range(attention.n_heads):
        with _sinks(model, attention, head):
            context = _contexts(model, attention, [], seed=0)[:1]
        moved = beyond_rounding(context, plain).any(1)[0]
        found = [h for h, s in enumerate(columns.starts) if moved[s : s + columns.width].any()]
        if found != [head]:
            raise AdapterError(f"perturbing sink {head} moved heads {found}, not [{head}]")


@contextmanager
def _sinks(model: nn.Module, attention: AttentionLayout, loud: int | None) -> Iterator[None]:
    """Sinks that take little attention away, but for one head's; trained ones may take it all, or none."""
    if not attention.has("sink"):
        yield
        return
    weight = attention.block("sink").weight
    owner = model.get_submodule(weight.module)
    name = weight.parameter.rpartition(".")[2]
    before = owner._parameters[name]
    assert before is not None
    values = torch.zeros_like(before, requires_grad=False)
    if loud is not None:
        values[weight.starts[loud]] = 4.0
    owner._parameters[name] = nn.Parameter(values, requires_grad=False)
    try:
        yield
    finally:
        owner._parameters[name] = before
