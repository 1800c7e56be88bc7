"""What an adapter says about a module that torch-pruning describes wrongly, or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from nss_prune.graph.neurons import NeuronGroup


@dataclass(frozen=True)
class Change:
    """An attribute (or buffer) that a module must get when its neurons go."""

    module: nn.Module
    name: str
    value: Any

    def apply(self) -> None:
        """Set the attribute."""
        setattr(self.module, self.name, self.value)


@dataclass(frozen=True)
class Rescaling(Change):
    """A number, or the first rows of a parameter, that must be multiplied by ``value``.

    Attributes:
        parts: The rows are the first of so many equal parts.
    """

    parts: int = 1

    def apply(self) -> None:
        """Multiply what the attribute is by now; an integer stays one."""
        old = getattr(self.module, self.name)
        if not isinstance(old, Tensor):
            scaled = old * self.value
            setattr(self.module, self.name, round(scaled) if isinstance(old, int) else scaled)
            return
        new = old.detach().clone()
        new[: len(new) // self.parts] *= self.value
        setattr(self.module, self.name, nn.Parameter(new, old.requires_grad))


class Adapter(Protocol):
    """Knows one structure, which it recognises by what a module has and not by its class."""

    def groups(self, name: str, module: nn.Module) -> tuple[NeuronGroup, ...]:
        """The neurons inside a module; () where it does not have the structure.

        Args:
            name: Qualified name of the module; all names in the groups begin with it.
        """
        ...

    def changes(self, module: nn.Module, group: NeuronGroup, kept: Tensor) -> Iterable[Change]:
        """What else must change in a module of the structure when neurons of a group go.

        It is asked before anything has changed.

        Args:
            group: One of the module's groups.
            kept: True for the neurons that stay, bool ``[neurons]``.
        """
        ...
