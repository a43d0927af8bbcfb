"""A small layout with every kind of parameter, random data for it, and a run that stores the data."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch

from fisherscope.layout import AttentionLayout, HeadBlock, MlpLayout, ModelLayout, ParameterInfo, Partition
from fisherscope.store import StoreHeader, StoreWriter

WIDTH = 12


def names(directory):
    """The names in a directory, sorted."""
    return sorted(path.name for path in directory.iterdir())


def _info(name, shape, kind="attention", layer=0):
    return ParameterInfo(name, shape, kind, layer)


def fused_layer(layer, *, bias=True):
    """GPT-2 like: Conv1D weights ``[in, out]``, Q, K and V fused, 3 heads of 4."""
    weight, out = f"h.{layer}.c_attn.weight", f"h.{layer}.c_proj.weight"
    biased = f"h.{layer}.c_attn.bias"
    infos = [_info(weight, (WIDTH, 3 * WIDTH), layer=layer), _info(out, (WIDTH, WIDTH), layer=layer)]
    if bias:
        infos += [_info(biased, (3 * WIDTH,), layer=layer)]
        infos += [_info(f"h.{layer}.c_proj.bias", (WIDTH,), layer=layer)]
    blocks = [
        HeadBlock(
            name,
            Partition.regular(weight, (WIDTH, 3 * WIDTH), 1, 3, 4, offset=WIDTH * i),
            Partition.regular(biased, (3 * WIDTH,), 0, 3, 4, offset=WIDTH * i) if bias else None,
        )
        for i, name in enumerate("QKV")
    ]
    blocks.append(HeadBlock("O", Partition.regular(out, (WIDTH, WIDTH), 0, 3, 4)))
    return infos, AttentionLayout(layer, f"h.{layer}", f"h.{layer}.c_proj", 3, 3, tuple(blocks))


def separate_layer(layer, *, bias=True):
    """Llama like: Linear weights ``[out, in]``, 4 query heads of 2, 2 kv heads, K without a bias."""
    shapes = {"Q": (8, WIDTH), "K": (4, WIDTH), "V": (4, WIDTH), "O": (WIDTH, 8)}
    heads = {"Q": 4, "K": 2, "V": 2, "O": 4}
    infos, blocks = [], []
    for name, shape in shapes.items():
        weight, axis = f"h.{layer}.{name.lower()}.weight", int(name == "O")
        infos.append(_info(weight, shape, layer=layer))
        partition = None
        if bias and name in "QV":
            biased = f"h.{layer}.{name.lower()}.bias"
            infos.append(_info(biased, shape[:1], layer=layer))
            partition = Partition.regular(biased, shape[:1], 0, heads[name], 2)
        blocks.append(HeadBlock(name, Partition.regular(weight, shape, axis, heads[name], 2), partition))
    return infos, AttentionLayout(layer, f"h.{layer}", f"h.{layer}.o", 4, 2, tuple(blocks))


def toy_layout(*, bias=True):
    """A fused layer, a separate one, an MLP, a norm, an embedding, and an awkward name."""
    fused, first = fused_layer(0, bias=bias)
    separate, second = separate_layer(1, bias=bias)
    mlp = [_info("h.1.up.weight", (5, WIDTH), "mlp", 1), _info("h.1.down.weight", (WIDTH, 5), "mlp", 1)]
    others = [_info("h.1.ln-é..weight", (WIDTH,), "norm", 1), _info("wte", (7, WIDTH), "embedding", -1)]
    channels = MlpLayout(
        1,
        "h.1.mlp",
        (
            Partition.regular("h.1.up.weight", (5, WIDTH), 0, 5, 1),
            Partition.regular("h.1.down.weight", (WIDTH, 5), 1, 5, 1),
        ),
    )
    return ModelLayout("toy", tuple(fused + separate + mlp + others), (first, second), (channels,))


def small_layout():
    """One separate layer and nothing else: few datasets, for tests that repeat a run often."""
    infos, attention = separate_layer(0)
    return ModelLayout("small", tuple(infos), (attention,))


def header_of(layout, **changes):
    """A header that instruments and stores every parameter."""
    names = tuple(info.name for info in layout.parameters)
    options = {
        "fingerprint": {"weights": "0123", "plan": {"batch_size": 2}},
        "layout": layout,
        "parameters": names,
        "gradient_parameters": names,
        "provenance": {"fisherscope": "0.1.0"},
    }
    return StoreHeader(**{**options, **changes})


@dataclass
class Run:
    """Random data for one task and how it is written; the same numbers every time."""

    header: StoreHeader
    n: int = 5
    task: str = "math"
    seed: int = 0
    batches: tuple = ((3, 1), (0, 4), (2,))
    gradients: dict = field(init=False)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        self.gradients = {
            info.name: torch.randn(self.n, *info.shape, generator=generator)
            for info in self.header.layout.parameters
        }
        groups = len(self.header.groups)
        self.square = torch.rand(self.n, groups, generator=generator)
        self.dot = torch.randn(self.n, groups, generator=generator)
        self.tokens = [row % 3 + 1 for row in range(self.n)]
        self.loss = [0.1 * row for row in range(self.n)]
        self.ids = [list(range(row, 2 * row + 1)) for row in range(self.n)]
        self.labels = [[-100, *ids[1:]] for ids in self.ids]
        self.texts = [f"text é {row}" for row in range(self.n)]
        self.keys = [hashlib.sha256(f"{self.task}{row}".encode()).hexdigest()[:32] for row in range(self.n)]

    @property
    def ragged(self):
        return {
            "ids": [len(ids) for ids in self.ids],
            "labels": [len(labels) for labels in self.labels],
            "text": [len(text.encode()) for text in self.texts],
        }

    def open_segment(self, writer, rows, **options):
        ragged = {family: [lengths[row] for row in rows] for family, lengths in self.ragged.items()}
        return writer.segment(self.task, rows, ragged=ragged, **options)

    def put(self, segment, rows, start=0, *, gradients=True):
        """Put some rows of the run into a segment, from position ``start``."""
        rows = list(rows)
        for name in ("tokens", "loss"):
            segment.put(f"sample/{name}", start, [getattr(self, name)[row] for row in rows])
        segment.put("sample/length", start, [len(self.ids[row]) for row in rows])
        segment.put("sample/truncated", start, np.zeros(len(rows), dtype=np.int64))
        segment.put("ids/input", start, [self.ids[row] for row in rows])
        segment.put("labels/ids", start, [np.array(self.labels[row]) for row in rows])
        segment.put("text/bytes", start, [self.texts[row].encode() for row in rows])
        if self.header.squares == "wide":
            segment.put("groups/norm", start, self.square[rows].sqrt())
        else:
            segment.put("groups/square", start, self.square[rows])
        segment.put("groups/dot", start, self.dot[rows])
        for name in self.header.gradient_parameters if gradients else ():
            segment.put_gradient(name, start, self.gradients[name][rows])

    def write_segment(self, writer, rows):
        with self.open_segment(writer, rows) as segment:
            self.put(segment, rows)
            segment.commit()

    def arrays(self, batches):
        """The aggregate over some batches: sums of squares and of gradients."""
        rows = [row for batch in batches for row in self.batches[batch]]
        squares = {f"fisher/data/{k}": g[rows].square().sum(0) for k, g in self.gradients.items()}
        sums = {f"mean/{k}": g[rows].sum(0) for k, g in self.gradients.items()}
        moments = {"moments/mean": self.square[rows].double().mean(0)}
        if self.header.squares == "plain":
            return {**squares, **sums, **moments}
        # every rank and state has units of its own, and some of every sum is in what rounding took
        exponents = {
            name: 20 - 7 * (place % 5) - len(rows) for place, name in enumerate(self.header.parameters)
        }
        scaled = {name: v * 2.0 ** (2 * exponents[name.split("/", 2)[2]]) for name, v in squares.items()}
        scaled |= {name: v * 2.0 ** exponents[name.split("/", 1)[1]] for name, v in sums.items()}
        lost = {f"lost/{name}": (v * 2.0**-26).to(torch.bfloat16) for name, v in scaled.items()}
        listed = torch.tensor([exponents[name] for name in self.header.parameters])
        return {**scaled, **lost, **moments, "exponents/data": listed}

    def constants(self):
        return {"groups/theta_square": np.arange(len(self.header.groups), dtype=np.float64)}

    def write(self, path, **options):
        """The whole run, or what is missing of it: constants, segments, a snapshot after each."""
        with StoreWriter.open(path, self.header, **options) as writer:
            self.finish(writer)

    def finish(self, writer):
        writer.constants(self.constants())
        writer.declare_task(self.task, self.keys)
        snapshot = writer.load_snapshot(self.task)
        covered = list(snapshot.batches) if snapshot else []
        for number, rows in enumerate(self.batches):
            if not writer.committed_rows(self.task).issuperset(rows):
                self.write_segment(writer, rows)
            if number not in covered:
                covered.append(number)
                count = sum(len(self.batches[b]) for b in covered)
                writer.snapshot(self.task, covered, count, self.arrays(covered))
        writer.flush()


def assert_holds(store, run):
    """The store holds exactly the run's data, in row order."""
    task = run.task
    assert store.is_complete(task)
    frame = store.samples(task)
    assert frame["row"].tolist() == list(range(run.n))
    assert frame["key"].tolist() == run.keys
    assert frame["tokens"].tolist() == run.tokens
    assert frame["loss"].tolist() == run.loss
    assert frame["text"].tolist() == run.texts
    kind = {"bfloat16": torch.bfloat16, "float32": torch.float32}[store.header.gradient_dtype]
    for name, expected in run.gradients.items():
        assert torch.equal(store.gradients(task, name), expected.to(kind).float()), name
        total = run.arrays(range(len(run.batches)))[f"fisher/data/{name}"]
        assert torch.equal(store.fisher(task, name), (total.double() / run.n).float()), name
    values = store.group_values(task)
    np.testing.assert_array_equal(values["square"].values, run.square.numpy())
    np.testing.assert_array_equal(values["dot"].values, run.dot.numpy())
    np.testing.assert_array_equal(
        store.constants()["groups/theta_square"], run.constants()["groups/theta_square"]
    )
    for row in range(run.n):
        ids, labels = store.token_ids(task, row)
        assert (ids.tolist(), labels.tolist()) == (run.ids[row], run.labels[row])
