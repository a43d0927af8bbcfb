"""How much memory there is, how much a pass takes, and what it looks like when there is not enough."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fisherscope.store.memory import free_memory, parse_bytes

__all__ = ["PeakMemory", "SavedBytes", "is_out_of_memory", "parse_bytes", "release", "usable"]

_SHARE = {"cpu": 0.5}  # other programs need some, too
_SHARE_ACCELERATOR = 0.8


def usable(device: torch.device) -> int:
    """Bytes that a collection may take: half of what is free on a CPU, on a GPU what is left to 80 %."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(int(free + cached - (1 - _SHARE_ACCELERATOR) * total), 0)
    if device.type == "cpu":
        return int(_SHARE["cpu"] * free_memory())
    return int(_SHARE_ACCELERATOR * free_memory())


class SavedBytes:
    """Counts what autograd keeps for the backward pass while the context lasts.

    Attributes:
        total: bytes, each storage once and without those that were there before.
    """

    def __init__(self, apart: Iterable[Tensor]) -> None:
        """Count all but the storages of ``apart``, such as the model's weights."""
        # sparse tensors have no storage of their own
        dense = (tensor for tensor in apart if tensor.layout is torch.strided)
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in dense}
        self._alive: list[Tensor] = []
        self.total = 0

    @contextmanager
    def counted(self) -> Iterator[SavedBytes]:
        """The context."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield self
        self._alive.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._alive.append(tensor)  # an address is given again once it is free
            self.total += storage.nbytes()
        return tensor


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


class PeakMemory:
    """The most memory that is taken beyond what was there when the context began.

    Attributes:
        bytes: once the context has ended; None where the machine cannot say.
    """

    def __init__(self, device: torch.device) -> None:
        """Measure on this device."""
        self._device = device
        self.bytes: int | None = None

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before: int | None = torch.cuda.memory_allocated(self._device)
        else:
            self._before = _resident() if _reset_peak() else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            return
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self.bytes = max(_peak_resident() - self._before, 0)


def _reset_peak() -> bool:
    """Linux forgets the highest resident size when 5 is written here."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _resident() -> int:
    return _status("VmRSS")


def _peak_resident() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(match[1]) * 1024 if match else 0


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory ran out, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    said = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in text for words in said)
