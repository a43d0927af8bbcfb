"""The metadata of an HDF5 file, laid out in memory: libhdf5 never writes to the disk.

A write that fails inside libhdf5 leaves it with dirty state which ends the interpreter at exit. So libhdf5
only decides where everything lies, on a file object that keeps what was written and none of the holes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fisherscope.store.dtypes import h5_type, stored_type

PAGE = 4096
_NEVER = 1 << 62


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset to be laid out.

    Attributes:
        name: path inside the file.
        shape: fixed.
        dtype: name of a stored type.
        spans: equal parts (heads) which no checksum block straddles.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    spans: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * stored_type(self.dtype).itemsize


@dataclass(frozen=True)
class Skeleton:
    """Where everything lies in a file that was not written yet.

    Attributes:
        metadata: the file's first bytes.
        offsets: first byte of each dataset, a multiple of the page size; 0 for an empty dataset.
        size: bytes of the whole file.
    """

    metadata: bytes
    offsets: dict[str, int]
    size: int


class _SparseFile:
    """A file object that keeps the pages which were written."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self.end = 0
        self._position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self.end)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        for inside, page, within in self._walk(len(view)):
            view[inside] = (
                self.pages[page][within] if page in self.pages else bytes(within.stop - within.start)
            )
        return len(view)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for inside, page, within in self._walk(len(view)):
            self.pages.setdefault(page, bytearray(PAGE))[within] = view[inside]
        self.end = max(self.end, self._position)
        return len(view)

    def _walk(self, length: int) -> Iterator[tuple[slice, int, slice]]:
        """Advance by ``length`` bytes, page by page."""
        done = 0
        while done < length:
            page, start = divmod(self._position, PAGE)
            step = min(PAGE - start, length - done)
            yield slice(done, done + step), page, slice(start, start + step)
            done += step
            self._position += step

    def truncate(self, size: int | None = None) -> int:
        self.end = self._position if size is None else size
        return self.end

    def flush(self) -> None:
        """Nothing is buffered."""


def lay_out(specs: Sequence[DatasetSpec], attributes: Mapping[str, bytes | int]) -> Skeleton:
    """Lay out an HDF5 file: metadata first, then every dataset contiguous on pages of its own.

    Args:
        specs: the datasets, in file order.
        attributes: of the root group; fixed-length strings and integers.

    Returns:
        The same for the same arguments, byte for byte: no times are recorded.
    """
    from h5py import h5f

    sparse = _SparseFile()
    # two passes: while the objects are created no data is allocated, so all metadata packs together
    file = h5f.create(b"shard", h5f.ACC_TRUNC, fcpl=_untimed("FILE_CREATE"), fapl=_access(sparse, _NEVER))
    _create_objects(file, specs, attributes)
    file.close()
    end_of_metadata = sparse.end
    file = h5f.open(b"shard", h5f.ACC_RDWR, fapl=_access(sparse, 1))
    offsets = {spec.name: _allocate(file, spec) for spec in specs}
    file.close()
    first = min((offset for offset in offsets.values() if offset), default=sparse.end)
    stray = [p for p, data in sparse.pages.items() if p * PAGE >= first and any(data)]
    if stray or end_of_metadata > first or any(offset % PAGE for offset in offsets.values()):
        raise RuntimeError("libhdf5 put metadata among the data: this version of HDF5 is not supported")
    metadata = bytearray(min(first, sparse.end))
    for page, data in sparse.pages.items():
        if page * PAGE < len(metadata):
            stop = min((page + 1) * PAGE, len(metadata))
            metadata[page * PAGE : stop] = data[: stop - page * PAGE]
    ends = [offsets[spec.name] + spec.nbytes for spec in specs]
    return Skeleton(bytes(metadata), offsets, max([sparse.end, *ends]))


def _access(sparse: _SparseFile, alignment_from: int) -> Any:
    from h5py import h5f, h5fd, h5p

    access = h5p.create(h5p.FILE_ACCESS)
    access.set_fileobj_driver(h5fd.fileobj_driver, sparse)
    # checksummed metadata, and readable by HDF5 1.10
    access.set_libver_bounds(h5f.LIBVER_V110, h5f.LIBVER_V110)
    access.set_alignment(alignment_from, PAGE)
    return access


def _untimed(kind: str) -> Any:
    from h5py import h5p

    properties = h5p.create(getattr(h5p, kind))
    properties.set_obj_track_times(False)
    return properties


def _create_objects(file: Any, specs: Sequence[DatasetSpec], attributes: Mapping[str, bytes | int]) -> None:
    from h5py import h5a, h5d, h5g, h5s, h5t

    root = h5g.open(file, b"/")
    for key, value in attributes.items():
        array = np.array(value)
        attribute = h5a.create(root, key.encode(), h5t.py_create(array.dtype), h5s.create(h5s.SCALAR))
        attribute.write(array)
    group_properties, creation = _untimed("GROUP_CREATE"), _untimed("DATASET_CREATE")
    creation.set_layout(h5d.CONTIGUOUS)
    creation.set_alloc_time(h5d.ALLOC_TIME_LATE)
    creation.set_fill_time(h5d.FILL_TIME_NEVER)
    made: set[str] = set()
    for spec in specs:
        parts = spec.name.split("/")
        for depth in range(1, len(parts)):
            group = "/".join(parts[:depth])
            if group not in made:
                made.add(group)
                h5g.create(file, group.encode(), gcpl=group_properties)
        h5d.create(file, spec.name.encode(), h5_type(spec.dtype), h5s.create_simple(spec.shape), creation)


def _allocate(file: Any, spec: DatasetSpec) -> int:
    """Have libhdf5 place a dataset's data, by writing one zero; return the offset."""
    from h5py import h5d, h5s

    if not spec.nbytes:
        return 0
    dataset = h5d.open(file, spec.name.encode())
    target, source = dataset.get_space(), dataset.get_space()
    if spec.shape:
        target.select_elements(np.zeros((1, len(spec.shape)), dtype=np.uint64))
        source = h5s.create_simple((1,))
    kind = dataset.get_type()
    dataset.write(source, target, np.zeros(1, dtype=f"V{kind.get_size()}"), kind)
    return int(dataset.get_offset())
