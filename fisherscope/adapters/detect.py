"""Finding heads and channels in a model that nobody registered, from its structure alone.

One forward pass shows in which order the linear maps of each layer are called, on which inputs, and how wide
they are. Q, K and V are maps of one input (in cross attention, of two) that are followed by a map whose input
is as wide as all heads' contexts; an MLP is one or two maps of one input followed by one as wide as they are.
Each way to read a layer like that is a proposal in terms of the patterns that adapters are written in, and
none is believed before the probe has confirmed it. Names of modules are never looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

from torch import Tensor, nn

from fisherscope.adapters.build import Stack, build_layout, layer_lists
from fisherscope.adapters.channels import verify_channels
from fisherscope.adapters.injected import bare_path, is_added, tuned_layers
from fisherscope.adapters.inputs import run_small
from fisherscope.adapters.modules import in_features, is_linear_map, out_features
from fisherscope.adapters.patterns import (
    AttentionPattern,
    Fused,
    JoinedKeyValue,
    Latent,
    Mlp,
    MlpPattern,
    Separate,
)
from fisherscope.adapters.probe import is_causal, verify_attention
from fisherscope.errors import AdapterError
from fisherscope.layout import ModelLayout

_ORDERS = tuple(permutations(("Q", "K", "V")))
_MOST_PROPOSALS = 120
_COUPLINGS: tuple[tuple[str, ...], ...] = ((), ("Q", "K"))


@dataclass(frozen=True)
class _Call:
    """One call of a linear map in a layer: its path in the layer, its sizes, and what its input was."""

    path: str
    inputs: int
    outputs: int
    source: int


@dataclass(frozen=True)
class _Proposal:
    """One way to read a layer's attention."""

    pattern: AttentionPattern
    n_heads: int
    n_kv_heads: int
    used: tuple[str, ...]
    coupled: tuple[str, ...] = ()
    is_cross: bool = False


@dataclass
class _Layer:
    """What was confirmed in one layer."""

    attention: list[_Proposal] = field(default_factory=list)
    mlps: list[MlpPattern] = field(default_factory=list)


@dataclass(frozen=True)
class Detection:
    """What was found in a model.

    Attributes:
        layout: heads and channels that the probe confirmed.
        without_heads: paths of the layers in which no heads were confirmed, and of further modules that are
            called attention and were run.
        reason: why not, in words, for the first of them.
    """

    layout: ModelLayout
    without_heads: tuple[str, ...]
    reason: str


def detect(model: nn.Module, model_type: str) -> Detection:
    """Propose and confirm the layout of every kind of layer.

    Raises:
        AdapterError: the model has no layers that can be looked at, or does not run on a small input.
    """
    lists = layer_lists(model)
    if not lists:
        raise AdapterError("it has no list of layers with linear maps")
    calls = _trace(model, [path for path, _ in lists])
    if not any(calls.values()):
        raise AdapterError("none of its linear maps was called on a small input")
    stacks: list[Stack] = []
    missing: list[str] = []
    reasons: list[str] = []
    known: dict[tuple[Any, ...], _Layer] = {}
    for path, name in lists:
        layers = []
        for child, _ in model.get_submodule(path).named_children():
            where = f"{path}.{child}"
            kind = tuple(calls[where])
            if kind not in known:
                known[kind] = _read_layer(model, where, calls[where], reasons)
            layers.append(known[kind])
            if calls[where] and not known[kind].attention:
                missing.append(where)
        stacks.extend(_stacks(path, name, layers))
    layout = build_layout(model, model_type, stacks, source="detected")
    if len(lists) == 1 and layout.attention:
        # the path of a single stack does not tell what it is: BERT's may decode, ViT's is called "layers"
        name = "decoder" if is_causal(model, layout.attention[0]) else "encoder"
        renamed = [replace(stack, name=stack.name.replace(lists[0][1], name, 1)) for stack in stacks]
        layout = build_layout(model, model_type, renamed, source="detected")
    missing += _unexplained(model, layout, calls)
    return Detection(layout, tuple(missing), reasons[0] if reasons else "no projections were found there")


def _stacks(path: str, name: str, layers: Sequence[_Layer]) -> Iterator[Stack]:
    """The layers' MLPs and first self-attention, then further ones ("decoder 2"), then cross attention."""
    own = [[p for p in layer.attention if not p.is_cross] for layer in layers]
    most = max([1, *map(len, own)])
    columns = [tuple(found[k] if k < len(found) else None for found in own) for k in range(most)]
    cross = tuple(next((p for p in layer.attention if p.is_cross), None) for layer in layers)
    names = [name, *(f"{name} {number}" for number in range(2, len(columns) + 1))]
    if any(cross):
        columns.append(cross)
        names.append("cross")
    for number, (column, stack) in enumerate(zip(columns, names, strict=True)):
        yield Stack(
            layers=path,
            attention=[p.pattern if p else None for p in column],
            mlp=[tuple(layer.mlps) if number == 0 else None for layer in layers],
            n_heads=[p.n_heads if p else 1 for p in column],
            n_kv_heads=[p.n_kv_heads if p else 1 for p in column],
            name=stack,
        )


def _unexplained(model: nn.Module, layout: ModelLayout, calls: Mapping[str, Sequence[_Call]]) -> list[str]:
    """Attention, by the names of classes, where no heads were looked for: beside other heads, or not run."""
    known = {block.weight.parameter for _, block in layout.head_blocks()}
    layers = {a.module for a in layout.attention}
    found = []
    for where, made in calls.items():
        if not made and any(map(_is_called_attention, model.get_submodule(where).modules())):
            found.append(where)
        if not any(module.startswith(f"{where}.") for module in layers):
            continue
        for path, module in model.get_submodule(where).named_modules():
            prefix = f"{where}.{path}."
            projections = [c for c in made if f"{where}.{c.path}".startswith(prefix)]
            if (
                _is_called_attention(module)
                and len(projections) > 1
                and not any(name.startswith(prefix) for name in known)
            ):
                found.append(f"{where}.{path}")
    return found


def _is_called_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _trace(model: nn.Module, lists: Sequence[str]) -> dict[str, list[_Call]]:
    """Calls of the linear maps of each layer, in order, for one small sample."""
    calls: dict[str, list[_Call]] = {}
    sources: dict[tuple[Any, ...], int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def record(where: str, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            alive.append(given)
            source = sources.setdefault((given.data_ptr(), given.numel()), len(sources))
            calls[where].append(_Call(path, in_features(module), out_features(module), source))

        return hook

    with ExitStack() as stack:
        for container in lists:
            for child, layer in model.get_submodule(container).named_children():
                where = f"{container}.{child}"
                calls[where] = []
                tuned = tuned_layers(layer)
                for path, module in layer.named_modules():
                    if is_linear_map(module) and not is_added(path, tuned):
                        # adapters' patterns name a layer as it is called without PEFT around it
                        hook = record(where, bare_path(path))
                        handle = module.register_forward_hook(hook, with_kwargs=True)
                        stack.callback(handle.remove)
        run_small(model, 1, seed=0)
    return {where: _renumbered(found) for where, found in calls.items()}


def _renumbered(calls: Sequence[_Call]) -> list[_Call]:
    """Sources numbered within the layer, so that layers of one kind compare equal."""
    numbers: dict[int, int] = {}
    return [replace(call, source=numbers.setdefault(call.source, len(numbers))) for call in calls]


def _read_layer(model: nn.Module, where: str, calls: Sequence[_Call], reasons: list[str]) -> _Layer:
    """Confirm attention, cross attention and MLPs of one layer."""
    layer = _Layer()
    # layers that share their weights (ALBERT) are called several times: the first one is looked at
    first: dict[str, _Call] = {}
    for call in calls:
        first.setdefault(call.path, call)
    once = list(first.values())
    used: set[str] = set()
    sizes = {call.path: (call.inputs, call.outputs) for call in once}
    proposals = sorted(_attention_proposals(model, where, once), key=lambda p: _unlikeliness(p, list(sizes)))
    tried = 0
    for proposal in proposals:
        if used & set(proposal.used) or not _may_come_next(proposal, layer.attention, sizes):
            continue
        if (tried := tried + 1) > _MOST_PROPOSALS:
            break
        problem = _refused(lambda p=proposal: _check_attention(model, where, p))  # type: ignore[misc]
        if problem is None:
            layer.attention.append(proposal)
            used |= set(proposal.used)
        else:
            reasons.append(f"with {', '.join(proposal.used)} as its projections, {problem}")
    for mlp in _mlp_proposals([call for call in once if call.path not in used]):
        paths = {f"{mlp.module}.{name}".removeprefix(".") for name in (*mlp.expand, mlp.contract)}
        if used & paths:
            continue
        if _refused(lambda m=mlp: _check_mlp(model, where, m)) is None:  # type: ignore[misc]
            layer.mlps.append(mlp)
            used |= paths
    return layer


def _unlikeliness(proposal: _Proposal, order: Sequence[str]) -> tuple[bool, bool, int]:
    """Queries are formed before keys, and keys before values; norms over all heads are rare."""
    calls = [order.index(path) for path in proposal.used]
    return calls != sorted(calls), bool(proposal.coupled), -len(calls)


def _may_come_next(
    proposal: _Proposal, found: Sequence[_Proposal], sizes: Mapping[str, tuple[int, int]]
) -> bool:
    """A layer has one self-attention and one cross attention, or several of the same shape (LongCat)."""
    same = [other for other in found if other.is_cross == proposal.is_cross]
    if proposal.is_cross:
        return not same
    shapes = [sizes[path] for path in proposal.used]
    return all(shapes == [sizes[path] for path in other.used] for other in same)


def _refused(check: Callable[[], None]) -> str | None:
    try:
        check()
    except (AdapterError, ValueError) as error:
        return str(error)
    return None


def _check_attention(model: nn.Module, where: str, proposal: _Proposal) -> None:
    layout = proposal.pattern.layout(model.get_submodule, where, 0, proposal.n_heads, proposal.n_kv_heads)
    if layout is not None:
        verify_attention(model, layout)


def _check_mlp(model: nn.Module, where: str, mlp: Mlp) -> None:
    layout = mlp.layout(model.get_submodule, where, 0)
    if layout is not None:
        verify_channels(model, layout)


def _attention_proposals(model: nn.Module, where: str, calls: Sequence[_Call]) -> Iterator[_Proposal]:
    """Ways to read a layer's calls as attention, the likelier ones first."""
    for at, output in enumerate(calls):
        before = calls[:at]
        for heads in _head_counts(model, where, output):
            if output.inputs % heads:
                continue
            for group in _groups(before):
                yield from _of_one_input(group, output, heads)
            yield from _of_two_inputs(before, output, heads)
            yield from _latent(before, output, heads)


def _groups(calls: Sequence[_Call]) -> Iterator[list[_Call]]:
    """Calls that share an input, latest group first: O follows its projections closely."""
    sources = dict.fromkeys(call.source for call in reversed(calls))
    for source in sources:
        yield [call for call in calls if call.source == source]


def _of_one_input(group: Sequence[_Call], output: _Call, heads: int) -> Iterator[_Proposal]:
    context = output.inputs // heads
    if len(group) >= 3:
        for query, key, value in permutations(group, 3):
            yield from _separate(query, key, value, output, heads)
    if len(group) >= 2:
        for query, joined in permutations(group, 2):
            yield from _joined(query, joined, output, heads)
    for fused in group:
        kv_heads, rest = divmod(fused.outputs - heads * context, 2 * context)
        if rest or kv_heads < 1 or heads % kv_heads:
            continue
        used = (fused.path, output.path)
        for sections in dict.fromkeys((1, kv_heads)):
            for order in _ORDERS:
                for coupled in _COUPLINGS:
                    module, qkv, o = _paths(*used)
                    pattern = Fused(module, qkv, o, sections, order, coupled)
                    yield _Proposal(pattern, heads, kv_heads, used, coupled)


def _of_two_inputs(before: Sequence[_Call], output: _Call, heads: int) -> Iterator[_Proposal]:
    """Cross attention: the queries come from one place, keys and values from another."""
    groups = list(_groups(before))
    for theirs in groups:
        if len(theirs) < 2:
            continue
        for query in (call for call in before if call.source != theirs[0].source):
            for key, value in permutations(theirs, 2):
                for proposal in _separate(query, key, value, output, heads):
                    yield replace(proposal, is_cross=True)


def _latent(before: Sequence[_Call], output: _Call, heads: int) -> Iterator[_Proposal]:
    """Keys and values expanded from a latent of their own: a head's part of it is wider than its value."""
    for query, expand in permutations(before, 2):
        key = expand.outputs // heads - output.inputs // heads
        if query.outputs % heads or expand.outputs % heads or not 0 < key <= query.outputs // heads:
            continue
        used = (query.path, expand.path, output.path)
        module, q, kv, o = _paths(*used)
        if query.source != expand.source:
            yield _Proposal(Latent(module, q, q, kv, o), heads, heads, used)


def _separate(query: _Call, key: _Call, value: _Call, output: _Call, heads: int) -> Iterator[_Proposal]:
    """Widths decide how many kv heads there are: a key is as wide as a query, a value as a context.

    A query projection of twice the width may hold gates beside the queries.
    """
    used = (query.path, key.path, value.path, output.path)
    module, q, k, v, o = _paths(*used)
    for gated in (False, True):
        width, rest = divmod(query.outputs, 2 * heads if gated else heads)
        if rest or key.outputs % width:
            continue
        kv_heads = key.outputs // width
        if heads % kv_heads or value.outputs != kv_heads * (output.inputs // heads):
            continue
        for coupled in _COUPLINGS:
            pattern = Separate(module, q, k, v, o, coupled, gated)
            yield _Proposal(pattern, heads, kv_heads, used, coupled)


def _joined(query: _Call, joined: _Call, output: _Call, heads: int) -> Iterator[_Proposal]:
    width = output.inputs // heads
    kv_heads, rest = divmod(joined.outputs, 2 * width)
    if query.outputs != output.inputs or rest or kv_heads < 1 or heads % kv_heads:
        return
    used = (query.path, joined.path, output.path)
    module, q, kv, o = _paths(*used)
    orders: tuple[tuple[str, str], ...] = (("K", "V"), ("V", "K"))
    for grouped in dict.fromkeys((False, kv_heads > 1)):
        for order in orders:
            pattern = JoinedKeyValue(module, q, kv, o, grouped, order)
            yield _Proposal(pattern, heads, kv_heads, used)


def _mlp_proposals(calls: Sequence[_Call]) -> Iterator[Mlp]:
    """One or two maps of one input, and a later one that is as wide as each of them, or half as wide."""
    for at, contract in enumerate(calls):
        for group in _groups(calls[:at]):
            equal = [call for call in group if call.outputs == contract.inputs]
            for pair in permutations(equal, 2):
                module, *paths = _paths(*(call.path for call in pair), contract.path)
                yield Mlp(module, (paths[0], paths[1]), paths[2])
            for call in group:
                stacked, rest = divmod(call.outputs, contract.inputs)
                if rest == 0 and stacked in {1, 2}:
                    module, expand, down = _paths(call.path, contract.path)
                    yield Mlp(module, (expand,), down, stacked=stacked)


def _paths(*paths: str) -> tuple[str, ...]:
    """The innermost module that holds all of them, and each one's path in it."""
    split = [path.split(".") for path in paths]
    depth = 0
    while all(len(parts) > depth + 1 and parts[depth] == split[0][depth] for parts in split):
        depth += 1
    return ".".join(split[0][:depth]), *(".".join(parts[depth:]) for parts in split)


def _head_counts(model: nn.Module, where: str, output: _Call) -> list[int]:
    """Numbers that the attention module or the config calls heads, or that a head's size implies.

    The modules around the projection know best; the probe finds out which one is right.
    """
    config: Any = model.config
    parts = f"{where}.{output.path}".split(".")
    modules: list[Any] = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts) - 1, 0, -1)]
    sources = [vars(m) for m in modules] + [vars(c) for c in (config.get_text_config(), config)]
    counts: list[int] = []
    for source in sources:
        for name, value in source.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1 or "head" not in name:
                continue
            if any(word in name for word in ("dim", "size")):
                counts.append(output.inputs // value)
            else:
                counts.append(value)
    return [count for count in dict.fromkeys(counts) if count > 0]
