"""``tokens.json``: how the tokens that occur in a store read, for reports without the tokenizer. Optional."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fisherscope.errors import CorruptStoreError
from fisherscope.store import disk
from fisherscope.store.checksum import crc32_hex
from fisherscope.store.disk import Durability
from fisherscope.store.journal import canonical

TOKENS_FILE = "tokens.json"
MAX_TOKENS_BYTES = 16 << 20
MAX_CHARACTERS = 1024
_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_MOST = 2**31
# control characters but tab and newline, and halves of surrogate pairs
_HARMFUL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

logger = logging.getLogger(__name__)


def can_be_kept(text: Any) -> bool:
    """Whether something is the text of a token as stores keep it: short, and harmless on a terminal."""
    return isinstance(text, str) and len(text) <= MAX_CHARACTERS and not _HARMFUL.search(text)


def read_token_texts(root: Path) -> dict[int, str]:
    """The texts of the tokens of a store, by id; none where they were not kept.

    Raises:
        CorruptStoreError: the file is damaged, or none of a store's.
    """
    try:
        content = disk.read_inside(root, TOKENS_FILE, limit=MAX_TOKENS_BYTES)
    except FileNotFoundError:
        return {}
    try:
        return _decoded(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(
            f"{root / TOKENS_FILE} is damaged: {error}. Restore it from a copy, or remove it: without it "
            "reports show the ids of tokens"
        ) from None


def write_token_texts(root: Path, texts: Mapping[int, str], durability: Durability, tmp: str) -> None:
    """Keep the texts of some tokens beside those that are there, in one file that replaces the one before.

    Only one writer of a store may call this at a time.

    Args:
        root: of the store.
        texts: by token id.
        durability: "power" syncs file and directory.
        tmp: name to write under; what a crash left there is overwritten.

    Raises:
        ValueError: an id or a text cannot be kept.
        StoreFullError: the disk cannot hold it; what was there stays.
    """
    for token, text in texts.items():
        if not 0 <= token < _MOST or not can_be_kept(text):
            raise ValueError(f"token {token} with text {text!r} cannot be kept: see can_be_kept")
    try:
        there = read_token_texts(root)
    except CorruptStoreError as error:
        logger.warning("%s. It is written anew", error)
        there = {}
    merged = there | dict(texts)
    content = _encoded(merged)
    if len(content) > MAX_TOKENS_BYTES:
        logger.warning("%s would be too large: new tokens are left out", root / TOKENS_FILE)
    elif merged != there:
        _write(root, content, tmp, durable=durability == "power")
    elif there and durability == "power":
        # whoever wrote it may have promised less
        disk.sync_path(root / TOKENS_FILE)
        disk.sync_path(root)


def _write(root: Path, content: bytes, tmp: str, *, durable: bool) -> None:
    with disk.full_disk_named(root / tmp, len(content)):
        fd = disk.create(root / tmp)
        try:
            disk.write_at(fd, content, 0)
            if durable:
                disk.sync(fd)
        except BaseException:
            disk.unlink_quietly(root / tmp)
            raise
        finally:
            os.close(fd)
    disk.rename(root / tmp, root / TOKENS_FILE)
    if durable:
        disk.sync_path(root)


def _encoded(texts: Mapping[int, str]) -> bytes:
    tokens = {str(token): text for token, text in texts.items()}
    return canonical({"crc32": crc32_hex(canonical(tokens)), "tokens": tokens}) + b"\n"


def _decoded(data: Any) -> dict[int, str]:
    """Texts by id.

    Raises:
        ValueError: they are not what a writer wrote.
    """
    tokens = data.get("tokens") if isinstance(data, dict) else None
    if not isinstance(tokens, dict) or not all(map(can_be_kept, tokens.values())):
        raise ValueError("it does not hold the texts of tokens")
    if data.get("crc32") != crc32_hex(canonical(tokens)):
        raise ValueError("its checksum is another")
    if not all(_ID.fullmatch(token) and int(token) < _MOST for token in tokens):
        raise ValueError("it names tokens by something else than their ids")
    return {int(token): text for token, text in tokens.items()}
