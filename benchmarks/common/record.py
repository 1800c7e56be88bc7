"""One result file that grows entry by entry, and that a stopped run goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from benchmarks.common import results
from benchmarks.common.tables import Cell, Column
from nss_prune.errors import ArgumentError

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Tables:
    """What a result file shows of its entries: its table, and whatever else explains it."""

    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Cell]]
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Record(Generic[Entry]):
    """The entries measured so far, and the file that keeps them.

    Attributes:
        path: The file.
        title: Of its table.
        kind: The dataclass of an entry.
        identity: What tells an entry from others; a new one replaces that of the same identity.
        tables: The tables of some entries.
        options: How they are measured; only entries that were measured likewise are taken over.
        device: Where.
        key: Under which name the file has the entries.
        entries: In the order in which they were added.
    """

    path: Path
    title: str
    kind: type[Entry]
    identity: Callable[[Entry], Hashable]
    tables: Callable[[Sequence[Entry]], Tables]
    options: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device | str = "cpu"
    key: str = "outcomes"
    entries: list[Entry] = field(default_factory=list)

    def __contains__(self, identity: Hashable) -> bool:
        return any(self.identity(entry) == identity for entry in self.entries)

    def resume(self) -> None:
        """Take over what the file has, if there is one.

        Raises:
            ArgumentError: It was measured in another way.
        """
        if not self.path.exists():
            return
        content = results.read(self.path)
        wanted = json.loads(json.dumps(dict(self.options)))
        if content.get("options", {}) != wanted:
            raise ArgumentError(
                f"{self.path} was measured with {content.get('options')}, and this run is with "
                f"{wanted}; measure in the same way, start anew (--fresh, or without --resume) or "
                "give another --output."
            )
        self.add(self.kind(**entry) for entry in content[self.key])

    def add(self, entries: Iterable[Entry]) -> None:
        """Add entries, in the place of those of the same identity."""
        added = list(entries)
        replaced = {self.identity(entry) for entry in added}
        self.forget(lambda entry: self.identity(entry) in replaced)
        self.entries += added

    def forget(self, unwanted: Callable[[Entry], bool]) -> None:
        """Drop entries."""
        self.entries = [entry for entry in self.entries if not unwanted(entry)]

    def save(self) -> None:
        """Write the file, whole or not at all."""
        shown = self.tables(self.entries)
        entries: list[Any] = self.entries
        results.write(
            self.path, self.title, shown.columns, shown.rows, device=self.device,
            seeds=sorted({getattr(entry, "seed", 0) for entry in entries}),
            options=dict(self.options), **shown.more,
            **{self.key: [asdict(entry) for entry in entries]},
        )  # fmt: skip
