"""The element types of stored datasets: their bytes in the file, in numpy, in torch and in HDF5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values: TypeAlias = Tensor | NDArray[Any] | Sequence[Any]

GRADIENT_DTYPES = ("bfloat16", "float32", "float16")  # float16 with a power of two as scale of each row


@dataclass(frozen=True)
class StoredType:
    """One element type.

    Attributes:
        name: as in the journal.
        raw: little-endian numpy type with the same bytes; bfloat16 has none of its own and travels as int16.
        torch: the torch type with the same bytes.
    """

    name: str
    raw: np.dtype[Any]
    torch: torch.dtype

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return int(self.raw.itemsize)


_TYPES = {
    t.name: t
    for t in (
        StoredType("bfloat16", np.dtype("<i2"), torch.bfloat16),
        StoredType("float16", np.dtype("<f2"), torch.float16),
        StoredType("float32", np.dtype("<f4"), torch.float32),
        StoredType("float64", np.dtype("<f8"), torch.float64),
        StoredType("int32", np.dtype("<i4"), torch.int32),
        StoredType("int64", np.dtype("<i8"), torch.int64),
        StoredType("uint8", np.dtype("u1"), torch.uint8),
    )
}


def stored_type(name: str) -> StoredType:
    """The type of that name.

    Raises:
        ValueError: the store has no such type.
    """
    try:
        return _TYPES[name]
    except (KeyError, TypeError):
        raise ValueError(f"the store has no element type {name!r}: it has {sorted(_TYPES)}") from None


def name_of(values: Tensor | NDArray[Any]) -> str:
    """Name of the stored type with the type of ``values``.

    Raises:
        ValueError: the store has no such type.
    """
    name = str(values.dtype).removeprefix("torch.")
    return stored_type(name).name


def gradient_dtype(name: str) -> str:
    """Check the type in which gradients are to be stored.

    Raises:
        ValueError: gradients cannot be stored in this type.
    """
    if name not in GRADIENT_DTYPES:
        raise ValueError(f"gradients cannot be stored as {name!r}: use one of {list(GRADIENT_DTYPES)}")
    return name


def h5_type(name: str) -> Any:
    """The HDF5 type; bfloat16 is a true 16-bit float, so that any HDF5 reader converts it."""
    from h5py import h5t

    if name == "bfloat16":
        kind = h5t.IEEE_F16LE.copy()
        kind.set_fields(15, 7, 8, 0, 7)  # sign bit; exponent position, size; mantissa position, size
        kind.set_ebias(127)
        return kind
    return h5t.py_create(stored_type(name).raw)


def to_raw(values: Values, name: str) -> NDArray[Any]:
    """The bytes to store, as a C-contiguous array of the raw type; floats are rounded to nearest even.

    Raises:
        ValueError: the values do not fit an integer type.
    """
    kind = stored_type(name)
    if kind.torch.is_floating_point:
        if name == "bfloat16" or isinstance(values, Tensor):
            tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
            tensor = tensor.detach().to(kind.torch).cpu().contiguous()
            values = (tensor.view(torch.int16) if name == "bfloat16" else tensor).numpy()
        return np.asarray(values, dtype=kind.raw, order="C")
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.size:
        limits = np.iinfo(kind.raw)
        if array.dtype.kind not in "iub":
            raise ValueError(f"{array.dtype} values cannot be stored as {name}")
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise ValueError(f"values {array.min()}..{array.max()} do not fit {name}")
    return np.asarray(array, dtype=kind.raw, order="C")


def to_tensor(raw: NDArray[Any], name: str) -> Tensor:
    """A writable tensor with exactly the bits of ``raw``, which is copied unless it is writable itself."""
    array = raw if raw.flags.writeable and raw.flags.c_contiguous else np.array(raw, order="C")
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if name == "bfloat16" else tensor
