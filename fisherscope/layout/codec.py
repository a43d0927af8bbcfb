"""JSON form of a model layout."""

from __future__ import annotations

from typing import Any

from fisherscope.layout.attention import AttentionLayout, HeadBlock
from fisherscope.layout.mlp import ExpertsLayout, MlpLayout, RowsLayout
from fisherscope.layout.model import ModelLayout, ParameterInfo
from fisherscope.layout.partition import Partition
from fisherscope.layout.shared import SharedModule


def encode(layout: ModelLayout) -> dict[str, Any]:
    """Plain lists, dicts, strings and ints."""
    found = {
        "model_type": layout.model_type,
        "source": layout.source,
        "parameters": [
            {"name": p.name, "shape": list(p.shape), "kind": p.kind, "layer": p.layer, "stack": p.stack}
            for p in layout.parameters
        ],
        "attention": [
            {
                "layer": a.layer,
                "stack": a.stack,
                "module": a.module,
                "output": a.output,
                "n_heads": a.n_heads,
                "n_kv_heads": a.n_kv_heads,
                "coupled": list(a.coupled),
                "blocks": [
                    {
                        "name": b.name,
                        "weight": _encode_partition(b.weight),
                        "bias": None if b.bias is None else _encode_partition(b.bias),
                    }
                    for b in a.blocks
                ],
            }
            for a in layout.attention
        ],
        "mlps": [_encode_mlp(m) for m in layout.mlps],
        "experts": [_encode_pieces(e) for e in layout.experts],
        "rows": [
            {
                "layer": r.layer,
                "stack": r.stack,
                "module": r.module,
                "weight": _encode_partition(r.weight),
                "bias": None if r.bias is None else _encode_partition(r.bias),
            }
            for r in layout.rows
        ],
    }
    if layout.shared:  # few models have any, and stores of earlier versions do not know of them
        found["shared"] = [{"module": s.module, "runs": s.runs} for s in layout.shared]
    return found


def decode(data: dict[str, Any]) -> ModelLayout:
    """Inverse of :func:`encode`.

    Raises:
        ValueError: a field is missing, has the wrong form, or contradicts another.
    """
    try:
        layout = ModelLayout(
            model_type=str(data["model_type"]),
            parameters=tuple(
                ParameterInfo(p["name"], _decode_shape(p["shape"]), p["kind"], p["layer"], p["stack"])
                for p in data["parameters"]
            ),
            attention=tuple(_decode_attention(a) for a in data["attention"]),
            mlps=tuple(
                MlpLayout(**_decode_pieces(m), block=str(m.get("block", "mlp"))) for m in data["mlps"]
            ),
            # stores of earlier versions know neither
            experts=tuple(ExpertsLayout(**_decode_pieces(e)) for e in data.get("experts", ())),
            rows=tuple(
                RowsLayout(
                    layer=r["layer"],
                    module=r["module"],
                    weight=_decode_partition(r["weight"]),
                    bias=None if r["bias"] is None else _decode_partition(r["bias"]),
                    stack=r["stack"],
                )
                for r in data.get("rows", ())
            ),
            source=data.get("source", "registered"),
            shared=tuple(SharedModule(s["module"], s["runs"]) for s in data.get("shared", ())),
        )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"not a model layout: {error!r}") from error
    check_partitions(layout)
    return layout


def check_partitions(layout: ModelLayout) -> None:
    """Confirm that every partition cuts a parameter of the model, and knows its shape.

    Raises:
        ValueError: one does not, or two parameters have one name.
    """
    shapes = {info.name: info.shape for info in layout.parameters}
    if len(shapes) != len(layout.parameters):
        raise ValueError("not a model layout: two parameters have one name")
    for partition in layout.partitions():
        if shapes.get(partition.parameter) != partition.shape:
            raise ValueError(
                f"not a model layout: a partition of {partition.parameter!r} expects the shape "
                f"{partition.shape}, the model has {shapes.get(partition.parameter)}"
            )


def _encode_mlp(mlp: MlpLayout) -> dict[str, Any]:
    """With the name of its block only where an adapter added it: other layouts stay as they were written."""
    return _encode_pieces(mlp) | ({} if mlp.block == "mlp" else {"block": mlp.block})


def _encode_pieces(module: MlpLayout | ExpertsLayout) -> dict[str, Any]:
    return {
        "layer": module.layer,
        "stack": module.stack,
        "module": module.module,
        "weights": [_encode_partition(p) for p in module.weights],
        "biases": [_encode_partition(p) for p in module.biases],
    }


def _decode_pieces(data: dict[str, Any]) -> dict[str, Any]:
    return {
        "layer": data["layer"],
        "stack": data["stack"],
        "module": data["module"],
        "weights": tuple(_decode_partition(p) for p in data["weights"]),
        "biases": tuple(_decode_partition(p) for p in data["biases"]),
    }


def _decode_attention(data: dict[str, Any]) -> AttentionLayout:
    return AttentionLayout(
        layer=data["layer"],
        module=data["module"],
        output=data["output"],
        n_heads=data["n_heads"],
        n_kv_heads=data["n_kv_heads"],
        blocks=tuple(
            HeadBlock(
                b["name"],
                _decode_partition(b["weight"]),
                None if b["bias"] is None else _decode_partition(b["bias"]),
            )
            for b in data["blocks"]
        ),
        stack=data["stack"],
        coupled=tuple(data.get("coupled", ())),
    )


def _encode_partition(partition: Partition) -> dict[str, Any]:
    starts: Any = list(partition.starts)
    if len(starts) > 2:
        stride = starts[1] - starts[0]
        if stride > 0 and starts == list(range(starts[0], starts[0] + stride * len(starts), stride)):
            starts = {"first": starts[0], "stride": stride, "count": len(starts)}
    return {
        "parameter": partition.parameter,
        "shape": list(partition.shape),
        "axis": partition.axis,
        "starts": starts,
        "width": partition.width,
    }


def _decode_partition(data: dict[str, Any]) -> Partition:
    starts = data["starts"]
    if isinstance(starts, dict):
        first, stride, count = starts["first"], starts["stride"], starts["count"]
        longest = max(data["shape"], default=0)
        if not 0 < count <= longest or stride < 1:
            raise ValueError(f"not a partition: {count} pieces of {data['parameter']!r}, stride {stride}")
        starts = range(first, first + stride * count, stride)
    shape = _decode_shape(data["shape"])
    return Partition(data["parameter"], shape, data["axis"], tuple(starts), data["width"])


def _decode_shape(data: list[int]) -> tuple[int, ...]:
    if not all(isinstance(n, int) and n >= 0 for n in data):
        raise ValueError(f"not a shape: {data!r}")
    return tuple(data)
