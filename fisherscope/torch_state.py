"""The global states of torch and numpy on which numbers would depend, set aside while fisherscope computes.

The defaults of torch belong to whoever runs the process: a default dtype of bfloat16 from loading a model, a
default device, ``torch.inference_mode`` around everything, products of float32 that are rounded to bfloat16
(``torch.set_float32_matmul_precision("medium")`` changes gradients by a percent), denormal numbers flushed to
zero, numpy that raises on underflow. What is collected and analysed is the same under all of them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def standard_state(device: torch.device | None = None) -> Iterator[None]:
    """Compute as a fresh process does, and leave every state as it was.

    Set aside are the default dtype and the precision of float32 products, which all threads share, and of
    this thread inference mode, ``no_grad``, the flushing of denormal numbers and what numpy does about
    floating-point errors. Autocast, deterministic algorithms, hooks for saved tensors and modes that watch
    torch's calls stay: they belong to how the user has the model run.

    Args:
        device: where a model is. In the place of a default device that somebody has set, code of others that
            names no device gets new tensors there. None leaves the default device alone.
    """
    with ExitStack() as stack:
        if not getattr(_thread, "is_inside", False):
            stack.enter_context(_shared.set_aside())
            stack.enter_context(_own_state())
        if device is not None and torch.get_default_device() not in {torch.device("cpu"), device}:
            stack.enter_context(device)
        yield


def in_standard_state(function: Callable[P, T]) -> Callable[P, T]:
    """Have a function compute in :func:`standard_state`; not for generators, which compute later."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with standard_state():
            return function(*args, **kwargs)

    return run


def in_full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Have a function multiply float32 in float32; it costs next to nothing where torch does so anyway."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if _precision() == "highest":
            return function(*args, **kwargs)
        with _shared.set_aside():
            return function(*args, **kwargs)

    return run


_thread = threading.local()


@contextmanager
def _own_state() -> Iterator[None]:
    """The states that each thread has of its own."""
    flushes = _flushes_denormals()
    _thread.is_inside = True
    try:
        if flushes:
            torch.set_flush_denormal(False)
        with (
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"),
        ):
            yield
    finally:
        _thread.is_inside = False
        if flushes:
            torch.set_flush_denormal(True)


def _flushes_denormals() -> bool:
    """Torch sets the flag of the processor, but does not tell it."""
    denormal = torch.full((1,), 1e-40, dtype=torch.float32, device="cpu")
    return not bool((denormal * 1.0).item())


class _Shared:
    """States of the whole process: set aside by the first that enters, restored by the last that leaves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._undo = ExitStack()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._undo = ExitStack()
                _default_dtype(self._undo)
                _matmul_precision(self._undo)
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._undo.close()


_shared = _Shared()


def _default_dtype(undo: ExitStack) -> None:
    before = torch.get_default_dtype()
    if before != torch.float32:
        torch.set_default_dtype(torch.float32)
        undo.callback(torch.set_default_dtype, before)


def _matmul_precision(undo: ExitStack) -> None:
    """Products of float32 in float32, on the CPU (where oneDNN can round to bfloat16) and on GPUs (TF32)."""
    before = _precision()
    if before == "highest":
        return
    # torch 2.9 and later keep one setting for each backend beside the one for all
    backends: list[Any] = [torch.backends.mkldnn, torch.backends.cuda]
    settings = [b.matmul for b in backends if hasattr(getattr(b, "matmul", None), "fp32_precision")]
    for setting in settings:
        undo.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
    if before is not None:
        undo.callback(torch.set_float32_matmul_precision, before)
    torch.set_float32_matmul_precision("highest")


def _precision() -> str | None:
    """The setting for all backends; None where settings of single backends contradict it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
