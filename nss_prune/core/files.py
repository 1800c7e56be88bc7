"""Files that are whole or not there: safetensors with a kind, a version and a digest.

A file is written aside and moved into place, so that an interrupted write leaves the old one as
it was, and nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nss_prune.errors import FileFormatError

VERSION = 1


def write_file(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], notes: dict[str, Any]
) -> None:
    """Write tensors and JSON notes as safetensors, whole or not at all.

    Args:
        path: the file; replaced if it exists.
        kind: what the file is, checked on reading.
        tensors: by name.
        notes: anything that JSON can hold.

    Raises:
        OSError: the file cannot be written.
    """
    stored = _unshared(tensors)
    text = json.dumps(notes)
    header = {"kind": kind, "version": str(VERSION), "notes": text}
    aside = Path(path).with_name(f".{Path(path).name}.{uuid.uuid4().hex}")
    try:
        save_file(stored, aside, {**header, "digest": _digest(stored, text)})
        os.replace(aside, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {os.fspath(path)!r}: {error}") from error
    finally:
        aside.unlink(missing_ok=True)


def read_file(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the notes of a file that :func:`write_file` wrote.

    Raises:
        FileFormatError: the file is damaged, foreign, of another kind or a newer version.
        OSError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_header(path, header, kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FileFormatError(
            f"{os.fspath(path)!r} is no safetensors file, or {_DAMAGED}"
        ) from error
    if header.get("digest") != _digest(tensors, header.get("notes", "")):
        raise FileFormatError(f"{os.fspath(path)!r} {_DAMAGED}")
    notes: dict[str, Any] = json.loads(header["notes"])
    return tensors, notes


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU; safetensors takes no two that share their storage."""
    stored: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return stored


_DAMAGED = "is damaged: its content is not what was written; restore or write it again"


def _check_header(path: str | os.PathLike[str], header: Mapping[str, str], kind: str) -> None:
    if header.get("kind") != kind:
        raise FileFormatError(
            f"{os.fspath(path)!r} holds {header.get('kind', 'something else')!r}, not {kind!r}: "
            "pass a file that this library wrote for this purpose"
        )
    version = header.get("version", "")
    if not version.isdecimal():
        raise FileFormatError(f"{os.fspath(path)!r} {_DAMAGED}")
    if int(version) > VERSION:
        raise FileFormatError(
            f"{os.fspath(path)!r} has format version {version}, this nss_prune reads up to "
            f"{VERSION}: upgrade nss_prune"
        )


def _digest(tensors: Mapping[str, Tensor], notes: str) -> str:
    digest = hashlib.blake2b(notes.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
