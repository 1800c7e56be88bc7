"""Files that are whole or not there: safetensors with a kind, a version and a digest.

A file is written aside and moved into place, so that an interrupted write leaves the old one as
it was. Nothing in it can run code, and nothing in it is used before it is checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nss_prune.core.replacing import replacing
from nss_prune.core.schema import Check
from nss_prune.core.text import first_line, shortened
from nss_prune.errors import FileFormatError, NSSPruneError

VERSION = 2
"""Of version 1, the digest did not cover the kind and the version."""

Contents = tuple[dict[str, Tensor], dict[str, Any]]
"""The tensors and the notes of a file."""


def write_file(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], notes: dict[str, Any]
) -> None:
    """Write tensors and JSON notes as safetensors, whole or not at all.

    Args:
        path: the file; replaced if it exists, as :func:`replacing` does it.
        kind: what the file is, checked on reading.
        tensors: by name.
        notes: anything that JSON can hold.

    Raises:
        OSError: the file cannot be written.
    """
    stored = _unshared(tensors)
    header = {"kind": kind, "version": str(VERSION), "notes": json.dumps(notes)}
    with replacing(path) as aside:
        try:
            save_file(stored, aside, {**header, "digest": _digest(stored, header)})
        except SafetensorError as error:
            raise OSError(f"cannot write {os.fspath(path)!r}: {error}") from error


def read_file(path: str | os.PathLike[str], kind: str, check: Check | None = None) -> Contents:
    """The tensors, on the CPU, and the notes of a file that :func:`write_file` wrote.

    Args:
        check: Of the notes, see :mod:`nss_prune.core.schema`.

    Raises:
        FileFormatError: the file is damaged, foreign, of another kind or a newer version, or has
            other notes than the check allows; or it is no file but a pipe, device or folder.
        OSError: the file cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for its writer
        raise FileFormatError(
            f"{os.fspath(path)!r} is a folder, pipe or device; give the path of a file"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            _check_header(path, header, kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        digest = _digest(tensors, header)
    except (NSSPruneError, OSError):
        raise
    except (SafetensorError, *FOREIGN) as error:
        raise FileFormatError(
            f"{os.fspath(path)!r} is no safetensors file, or {_DAMAGED} ({_named(error)})"
        ) from error
    if header.get("digest") != digest:
        raise FileFormatError(f"{os.fspath(path)!r} {_DAMAGED}")
    with checked_contents(path):
        notes = json.loads(header["notes"])
        if check is not None:
            check(notes, "")
    return tensors, notes


FOREIGN = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
"""What wrong contents can make Python or torch raise; RecursionError is a RuntimeError."""


@contextlib.contextmanager
def checked_contents(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around the decoding of a file, which touches no model: what it raises is FileFormatError."""
    try:
        yield
    except (NSSPruneError, *FOREIGN) as error:
        reason = str(error) if isinstance(error, NSSPruneError) else _named(error)
        raise FileFormatError(
            f"{os.fspath(path)!r} holds what this library never writes: {reason}; write it again"
        ) from error


def _named(error: Exception) -> str:
    """What a foreign error is, in short: it may hold anything of a file."""
    return f"{type(error).__name__}: {shortened(first_line(error), 120)}"


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
    if not (version.isascii() and version.isdecimal() and len(version) < 10):
        raise FileFormatError(f"{os.fspath(path)!r} {_DAMAGED}")
    if int(version) > VERSION:
        raise FileFormatError(
            f"{os.fspath(path)!r} has format version {version}, this nss_prune reads up to "
            f"{VERSION}: upgrade nss_prune"
        )
    if header.keys() != {"kind", "version", "notes", "digest"} or version[0] == "0":
        raise FileFormatError(f"{os.fspath(path)!r} {_DAMAGED}")


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    if header["version"] != "1":
        digest.update(json.dumps([header["kind"], header["version"]]).encode())
    digest.update(header["notes"].encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
