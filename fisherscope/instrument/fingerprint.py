"""What identifies a run: two runs with one fingerprint write the same store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherscope.errors import NonFiniteError

_CHUNK = 1 << 24
_DEEPEST = 8


def digest(values: Iterable[str]) -> str:
    """Short hash of a sequence of strings."""
    sha = hashlib.sha256()
    for value in values:
        sha.update(value.encode())
        sha.update(b"\0")
    return sha.hexdigest()[:32]


def weights_digest(model: nn.Module) -> str:
    """Hash of every parameter and buffer that the model saves: names, shapes, dtypes and bytes.

    Other state that modules save beside them counts by its plain values.

    Raises:
        NonFiniteError: a parameter is NaN or infinite; a buffer may be, as masks are.
    """
    sha = hashlib.sha256()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            sha.update(f"{name} {type(value).__qualname__} {plain_text(value)}\0".encode(errors="replace"))
            continue
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}\0".encode())
        flat = _flat(value.detach())
        for start in range(0, flat.numel(), _CHUNK):
            piece = flat[start : start + _CHUNK]
            is_broken = piece.is_floating_point() and not torch.isfinite(piece).all()
            if name in parameters and is_broken:
                raise NonFiniteError(
                    f"weight {name!r} has NaN or infinite entries: no gradient of this model means anything; "
                    "load another checkpoint or find what broke this one"
                )
            sha.update(_bytes(piece))
    return sha.hexdigest()[:32]


def _flat(tensor: Tensor) -> Tensor:
    """The entries of a tensor of any layout, one after the other."""
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(-1)


def plain_text(value: Any, depth: int = 0) -> str:
    """A text that stands for plain values, whatever holds them; of anything else its type."""
    if isinstance(value, Tensor):
        entries = _flat(value.detach()).cpu()
        return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(_bytes(entries)).hexdigest()}"
    if isinstance(value, Mapping) and depth < _DEEPEST:
        items = sorted((str(key), plain_text(item, depth + 1)) for key, item in value.items())
        return repr(items)
    if isinstance(value, list | tuple) and depth < _DEEPEST:
        return repr([plain_text(item, depth + 1) for item in value])
    is_plain = isinstance(value, str | bytes | int | float | complex | bool | None)
    return repr(value) if is_plain else type(value).__qualname__


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Hash of a tokenizer's vocabulary, special tokens and chat template; None for no tokenizer."""
    if tokenizer is None:
        return None
    if not hasattr(tokenizer, "get_vocab"):
        # an image processor has sizes and means in place of a vocabulary
        values = tokenizer.to_dict() if hasattr(tokenizer, "to_dict") else {}
        return digest([type(tokenizer).__name__, json.dumps(values, sort_keys=True, default=str)])
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return digest([type(tokenizer).__name__, vocabulary, special, str(tokenizer.chat_template)])


def _bytes(piece: Tensor) -> bytes:
    return piece.cpu().contiguous().view(torch.uint8).numpy().tobytes()
