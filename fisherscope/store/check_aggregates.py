"""Whether the arrays of snapshots and constants are of the type and shape that the header gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fisherscope.store.names import escape_path, unescape_path
from fisherscope.store.schema import StoreHeader
from fisherscope.store.shard_record import DatasetRecord
from fisherscope.store.units import EXPONENTS, LOST

_FLOATS = ("float32", "float64")  # sums of several ranks are kept in float64
_COUNT = ("int64",)


def aggregate_problems(known: Mapping[str, DatasetRecord], header: StoreHeader) -> Iterator[tuple[str, str]]:
    """Names of datasets that are not what they should be, and how; unknown names are left alone."""
    shapes = {info.name: info.shape for info in header.layout.parameters}
    groups = (len(header.groups),)
    for escaped, dataset in known.items():
        head, _, rest = unescape_path(escaped).partition("/")
        parameter = rest.partition("/")[2] if head == "fisher" else rest
        if head == LOST:
            of = escape_path(rest)
            wrong = _unlike(dataset, ("bfloat16",), known[of].spec.shape) if of in known else None
        elif head == EXPONENTS:
            wrong = _unlike(dataset, _COUNT, (len(header.parameters),))
        elif head in {"fisher", "mean"} and parameter in shapes:
            wrong = _unlike(dataset, _FLOATS, shapes[parameter])
        elif head == "moments":
            wrong = _unlike(dataset, *((_COUNT, (1,)) if rest.endswith("count") else (("float64",), groups)))
        elif head == "kronecker" and rest.startswith("positions/"):
            wrong = _unlike(dataset, _COUNT, (1,))
        elif head == "kronecker" and rest.startswith("exponents/"):
            wrong = _unlike(dataset, _COUNT, (2,))
        elif head == "kronecker":
            wrong = _unlike(dataset, _FLOATS, dataset.spec.shape[:1] * 2)
        elif (head, rest) == ("groups", "theta_square"):
            wrong = _unlike(dataset, ("float64",), groups)
        else:
            continue
        if wrong:
            yield escaped, wrong


def _unlike(dataset: DatasetRecord, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> str | None:
    """How a dataset differs from what it should be."""
    spec = dataset.spec
    if spec.dtype in dtypes and spec.shape == shape:
        return None
    return f"it is {spec.dtype} of shape {spec.shape}, expected {' or '.join(dtypes)} of {shape}"
