"""What identifies a run: two runs with one fingerprint write the same store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherscope.errors import NonFiniteError

_CHUNK = 1 << 24
_EXTRA_STATE = "_extra_state"
# of an image processor: what says where it came from, and not what it does
_NAMES_OF_PROCESSORS = ("type", "class", "name", "version")


def digest(values: Iterable[str]) -> str:
    """Short hash of a sequence of strings."""
    sha = hashlib.sha256()
    for value in values:
        sha.update(value.encode())
        sha.update(b"\0")
    return sha.hexdigest()[:32]


def weights_digest(model: nn.Module) -> str:
    """Hash of every parameter and buffer that the model saves: names, shapes, dtypes and bytes.

    Buffers may hold whatever their owner likes, -inf of a mask or NaN where nothing is read. What modules
    save beside tensors (extra state) is no weight: a counter of calls may stand there, and
    :mod:`~fisherscope.instrument.checking.probe` tells what it does.

    Raises:
        NonFiniteError: a parameter is NaN or infinite.
    """
    sha = hashlib.sha256()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        if name.rpartition(".")[2] == _EXTRA_STATE:
            continue
        if isinstance(value, Tensor):
            for piece in _pieces(name, value):
                if isinstance(piece, Tensor):
                    if name in parameters:
                        _refuse_broken(name, piece)
                    sha.update(_bytes(piece))
                else:
                    sha.update(piece)
        else:
            sha.update(f"{name} {plain_digest(value)}\0".encode())
    return sha.hexdigest()[:32]


def tensor_digest(tensor: Tensor) -> str:
    """Hash of the shape, dtype and bytes of a tensor of any layout."""
    sha = hashlib.sha256()
    for piece in _pieces("", tensor):
        sha.update(_bytes(piece) if isinstance(piece, Tensor) else piece)
    return sha.hexdigest()[:32]


def plain_digest(value: Any) -> str:
    """Hash of nested plain data and tensors; of anything else the name of its type counts."""
    return digest(_leaves(value))


def _leaves(value: Any) -> Iterator[str]:
    if value is None or isinstance(value, str | bytes | int | float | complex | torch.dtype | torch.device):
        yield repr(value)
    elif isinstance(value, Tensor):
        yield tensor_digest(value)
    elif isinstance(value, Mapping):
        yield "{"
        for key in sorted(value, key=repr):
            yield repr(key) if isinstance(key, str | int) else type(key).__qualname__
            yield from _leaves(value[key])
    elif isinstance(value, list | tuple):
        yield "["
        for item in value:
            yield from _leaves(item)
    else:
        yield type(value).__qualname__


def _pieces(name: str, tensor: Tensor) -> Iterator[Tensor | bytes]:
    """What a tensor consists of: words about it, and flat strided tensors of at most so many entries."""
    tensor = tensor.detach()
    yield f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode()
    if tensor.device.type == "meta":
        return
    if tensor.is_quantized:
        parts = [tensor.dequantize()]
    elif tensor.layout is not torch.strided:
        coo = tensor if tensor.layout is torch.sparse_coo else tensor.to_sparse()
        entries = coo.coalesce()
        parts = [entries.indices(), entries.values()]
    elif tensor.is_nested:
        parts = list(tensor.unbind())
    else:
        parts = [tensor]
    for part in parts:
        plain = part.resolve_conj().resolve_neg() if part.is_complex() else part
        flat = (torch.view_as_real(plain) if plain.is_complex() else plain).reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            yield flat[start : start + _CHUNK]


def _refuse_broken(name: str, piece: Tensor) -> None:
    if not piece.is_floating_point():
        return
    wide = piece if piece.dtype.itemsize > 1 else piece.float()
    if not torch.isfinite(wide).all():
        raise NonFiniteError(
            f"weight {name!r} has NaN or infinite entries: no gradient of this model means anything; "
            "load another checkpoint or find what broke this one"
        )


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Hash of a tokenizer's vocabulary; None for no tokenizer.

    Samples are known by their ids, so what else a tokenizer does (special tokens, templates, its class) shows
    in them where it matters. Token ids are told by the vocabulary alone.
    """
    if tokenizer is None:
        return None
    if not hasattr(tokenizer, "get_vocab"):
        # an image processor has sizes and means in place of a vocabulary
        values = tokenizer.to_dict() if hasattr(tokenizer, "to_dict") else {}
        kept = {k: v for k, v in values.items() if not any(word in k for word in _NAMES_OF_PROCESSORS)}
        return digest([json.dumps(kept, sort_keys=True, default=str)])
    return digest([json.dumps(tokenizer.get_vocab(), sort_keys=True)])


def _bytes(piece: Tensor) -> bytes:
    return piece.cpu().contiguous().view(torch.uint8).numpy().tobytes()
