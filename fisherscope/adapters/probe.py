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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fisherscope.adapters.inputs import run_small
from fisherscope.adapters.places import check_channel_places, check_places
from fisherscope.errors import AdapterError
from fisherscope.layout import AttentionLayout, HeadBlock, MlpLayout, ModelLayout, Partition

_DRAWS = 8
_CHANNEL_DRAWS = 32  # a rectified gate hides half of the channels in each

Change = Literal["added", "loud", "entry"]
Silent = Literal["", "V", "K"]


class _Captured(BaseException):
    """Ends the forward pass once the tensor looked for is known."""


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
        return _projection_of(self.block.weight)

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
            entries += scale * torch.randn(width, generator=generator)


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


def verify_channels(model: nn.Module, mlp: MlpLayout) -> None:
    """Confirm every channel of one MLP: an entry of an expanding projection moves one input of the other.

    Channels are changed many at a time: in row b those whose number has the binary digit b. Each input of the
    contracting projection then tells by the rows in which it moved which channel it belongs to.

    Raises:
        AdapterError: another channel moved than the layout says.
    """
    check_channel_places(model, mlp)
    *expand, contract = mlp.weights
    numbers = torch.arange(1, mlp.channels + 1)
    digits = [numbers.bitwise_right_shift(b).bitwise_and(1).bool() for b in range(mlp.channels.bit_length())]
    rows = [(partition, chosen) for partition in expand for chosen in digits]
    inputs_of = torch.tensor(contract.starts)
    expected = torch.zeros(len(rows), contract.shape[contract.axis], dtype=torch.bool)
    for row, (_, chosen) in enumerate(rows):
        expected[row, inputs_of[chosen]] = True
    reached = torch.zeros_like(expected)
    for draw in range(_CHANNEL_DRAWS):
        inputs = _channel_inputs(model, contract.module, rows, seed=draw)
        reached |= _beyond_rounding(inputs[1:], inputs[:1].expand(len(rows), -1, -1)).any(1).cpu()
        if (reached & ~expected).any() or torch.equal(reached, expected):
            break
    for (partition, _), found, wanted in zip(rows, reached, expected, strict=True):
        wrong = (found != wanted).nonzero().flatten().tolist()
        if wrong:
            moved = (
                "moves with channels that are not its own"
                if found[wrong[0]]
                else "does not move with its channel"
            )
            raise AdapterError(f"input {wrong[0]} of {contract.module} {moved} in {partition.module}")


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
    moved = _beyond_rounding(context[len(plain) :], references)
    columns = [slice(start, start + block.width) for start in block.starts]
    heads = torch.stack([moved[..., c].any(-1) for c in columns], -1)
    # where two or more heads were taken for one, the first of them ends before the middle
    halves = [slice((c.start + c.stop) // 2, c.stop) for c in columns]
    tails = torch.stack([moved[..., half].any(-1).any(-1) for half in halves], -1)
    return _Movement(heads, tails)


def _beyond_rounding(changed: Tensor, plain: Tensor) -> Tensor:
    """Where a row differs from its reference by more than rounding, relative to the larger of the two."""
    tolerance = max(1.5 * torch.finfo(plain.dtype).eps, 1e-4)
    largest = torch.maximum(changed.abs(), plain.abs())
    # a row of zeros is compared with others, too
    scale = largest.flatten(1).amax(1).clamp_min(1e-6 * float(largest.max()))
    return (changed - plain).abs() > tolerance * scale.view(-1, *(1,) * (plain.dim() - 1))


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
            quiet.setdefault(_projection_of(weight), []).append((row, weight))
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
    return _capture(model, attention.output, changes, len(silences), generator, "the O projection")


def _channel_inputs(
    model: nn.Module, contract: str, rows: Sequence[tuple[Partition, Tensor]], seed: int
) -> Tensor:
    """Inputs of the contracting projection: of a plain row, then with some channels perturbed in each."""
    generator = torch.Generator().manual_seed(seed)

    def change(path: str) -> Callable[[Tensor], None]:
        def apply(out: Tensor) -> None:
            for row, (partition, chosen) in enumerate(rows, start=1):
                if _projection_of(partition) == path:
                    # both ways by turns: half of a rectifier's inputs hide a change in one direction
                    out[row, 0, torch.tensor(partition.starts)[chosen]] += -4.0 if seed % 2 else 4.0

        return apply

    changes = {path: change(path) for path in dict.fromkeys(_projection_of(p) for p, _ in rows)}
    return _capture(model, contract, changes, 1 + len(rows), generator, "the contracting projection")


def _capture(
    model: nn.Module,
    where: str,
    changes: dict[str, Callable[[Tensor], None]],
    rows: int,
    generator: torch.Generator,
    what: str,
) -> Tensor:
    """The input of one module, ``[rows, positions, features]``, with changed outputs before it."""
    captured: list[Tensor] = []

    def capture(_module: nn.Module, args: tuple[Any, ...]) -> None:
        captured.append(args[0].detach())
        raise _Captured

    with ExitStack() as stack:
        for path, change in changes.items():
            hook = _replace_output(change, rows, generator)
            stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        handle = model.get_submodule(where).register_forward_pre_hook(capture)
        stack.callback(handle.remove)
        stack.enter_context(suppress(_Captured))
        run_small(model, rows, generator.initial_seed())
    if not captured:
        raise AdapterError(f"{where} was never called: it is not {what}")
    if captured[0].shape[0] % rows:
        raise AdapterError(f"{where} is given {captured[0].shape[0]} rows for {rows}: it mixes samples")
    return captured[0].reshape(rows, -1, captured[0].shape[-1])


def _replace_output(
    change: Callable[[Tensor], None], rows: int, generator: torch.Generator
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """A forward hook that gives all rows the same random output, and then each row its changes."""

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        if output.numel() % (rows * output.shape[-1]):
            raise AdapterError(f"a projection gives {tuple(output.shape)} for {rows} rows: it mixes samples")
        positions = output.numel() // (rows * output.shape[-1])
        noise = torch.randn(positions, output.shape[-1], generator=generator)
        out = noise.repeat(rows, 1, 1)
        change(out)
        return out.reshape(output.shape).to(output)

    return hook


def _verify_sinks(model: nn.Module, attention: AttentionLayout) -> None:
    """A head's sink takes attention away from that head alone."""
    columns = attention.block("O").weight
    with _sinks(model, attention, None):
        plain = _contexts(model, attention, [], seed=0)[:1]
    for head in range(attention.n_heads):
        with _sinks(model, attention, head):
            context = _contexts(model, attention, [], seed=0)[:1]
        moved = _beyond_rounding(context, plain).any(1)[0]
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


def _projection_of(partition: Partition) -> str:
    """The module whose output is the projection's: PEFT adds to the plain layer's."""
    return partition.module.partition(".base_layer")[0]
