"""Finished sums in a folder, from which a run that was broken off goes on.

Sums are named by what they are of and by a digest of the model and of what was asked for, so that
those of another model are never taken. In several processes the first reads and writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.files import read_file, write_file
from nss_prune.core.processes import decided, is_first
from nss_prune.core.undo import tensors_of

KIND = "nss_prune sums"

Records = dict[str, dict[str, Any]]
"""Kind -> name -> an object of a dataclass of tensors, and of what JSON can hold."""

log = logging.getLogger("nss_prune")


class Checkpoint:
    """Sums of finished passes.

    Args:
        folder: Made where it does not exist.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._written: list[Path] = []

    def records(
        self,
        name: str,
        model: nn.Module,
        asked: Any,
        kinds: Mapping[str, Callable[..., Any]],
        make: Callable[[], Records],
    ) -> Records:
        """The sums of that name, read where a run before has written them, made otherwise.

        Args:
            name: Of the pass, such as "effects".
            model: What they are of.
            asked: What else they depend on; its ``repr`` counts.
            kinds: Of the records, and the dataclass of each.

        Raises:
            FileFormatError: A file is damaged.
            OSError: A file cannot be read or written.
        """
        path = self.folder / f"{name}-{_digest(model, asked)}.safetensors"
        found: Records | None = decided(lambda: _read(path, kinds))
        if found is not None:
            log.info("%s: taken from %s", name, path)
        else:
            found = make()
            if is_first():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_file(path, KIND, *_encoded(found))
        self._written.append(path)
        return found

    def clear(self) -> None:
        """Delete what this run has read and written, once it is done."""
        if is_first():
            for path in self._written:
                path.unlink(missing_ok=True)
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()
        self._written.clear()


def _digest(model: nn.Module, asked: Any) -> str:
    digest = hashlib.blake2b(repr(asked).encode(), digest_size=12)
    for name, tensor in tensors_of(model).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _encoded(records: Records) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    notes: list[Any] = []
    for kind, named in records.items():
        for name, record in named.items():
            rest = {}
            for field in dataclasses.fields(record):
                value = getattr(record, field.name)
                if isinstance(value, Tensor):
                    tensors[f"{len(notes)}/{field.name}"] = value
                else:
                    rest[field.name] = value
            notes.append([kind, name, rest])
    return tensors, {"records": notes}


def _read(path: Path, kinds: Mapping[str, Callable[..., Any]]) -> Records | None:
    if not path.exists():
        return None
    tensors, notes = read_file(path, KIND)
    found: Records = {kind: {} for kind in kinds}
    fields: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, field = key.partition("/")
        fields.setdefault(number, {})[field] = tensor
    for position, (kind, name, rest) in enumerate(notes["records"]):
        rest = {key: tuple(v) if isinstance(v, list) else v for key, v in rest.items()}
        found[kind][name] = kinds[kind](**fields.get(str(position), {}), **rest)
    return found
