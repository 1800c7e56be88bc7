"""Neurons, the groups they are removed in, and where their channels lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from nss_prune.core.text import listing, shortened

Side = Literal["out", "in", "both"]


@dataclass(frozen=True)
class Member:
    """One side of a module (or a bare parameter) on which the neurons of a group lie.

    Attributes:
        name: Qualified name of the module, or of the parameter.
        side: ``out`` makes the neurons, ``in`` reads them, ``both`` passes them on
            (norms, depthwise convolutions, activations with weights).
        channels: Positions on that side, ``[positions]``.
        neurons: The neuron at each of these positions, ``[positions]``. A flattened feature
            map repeats a neuron, a split leaves some out.
        width: Number of positions on that side, those of other groups included.
        axis: For a bare parameter or buffer, the axis that carries the neurons; None for a module.
        sample_axis: Of a consumer's input, the axis of the samples.
    """

    name: str
    side: Side
    channels: Tensor
    neurons: Tensor
    width: int
    axis: int | None = None
    sample_axis: int = 0

    def __repr__(self) -> str:
        where = self.side if self.axis is None else f"axis {self.axis}"
        return (
            f"Member({shortened(self.name, 60)!r}, {where}: {len(self.channels)} of {self.width} "
            "channels)"
        )


@dataclass(frozen=True)
class NeuronGroup:
    """Neurons that torch-pruning couples: removed together or not at all.

    Attributes:
        name: Qualified name of the root layer.
        size: Number of neurons.
        members: All that must shrink when neurons go.
        ties: Channels of the root layer in each neuron: neuron n is its channels n, n + size,
            n + 2 size ...
        queries: Where neurons that are dimensions of every head have their queries; zero there, a
            dimension leaves the scores of the attention. Such a group is named after the module,
            and its channels are those of the heads as well.
        followed: Whether torch-pruning describes them wrongly, and following channels by labels
            has found them (:mod:`nss_prune.graph.coupled`).
    """

    name: str
    size: int
    members: tuple[Member, ...]
    ties: int = 1
    queries: Member | None = None
    followed: bool = False

    def __repr__(self) -> str:
        channels = f" of {self.ties} channels" if self.ties > 1 else ""
        return (
            f"NeuronGroup({shortened(self.name, 60)!r}: {self.size} neurons{channels}, "
            f"{len(self.members)} members)"
        )

    @property
    def has_channels(self) -> bool:
        """Whether a neuron is ``ties`` channels of the root layer; more make up a head."""
        if self.is_inside_heads:
            return False
        root = next((member for member in self.members if member.name == self.name), None)
        return root is None or len(root.channels) == self.size * self.ties

    @property
    def is_inside_heads(self) -> bool:
        """Whether a neuron is a dimension of every head."""
        return self.queries is not None

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Layers that read the neurons; their inputs are the neurons' activations."""
        return tuple(
            member for member in self.members if member.side == "in" and member.axis is None
        )

    @property
    def makers(self) -> tuple[Member, ...]:
        """Members that are layers which make the neurons."""
        return tuple(
            member for member in self.members if member.side == "out" and member.axis is None
        )

    @property
    def is_uneven(self) -> bool:
        """Whether its makers have different numbers of channels."""
        return len({len(member.channels) for member in self.makers}) > 1


@dataclass(frozen=True)
class NeuronMap:
    """All neurons of a model.

    Attributes:
        groups: In the order of ``model.named_modules()``.
        left_alone: Root layer -> why its group must not be pruned.
        left_alone_sizes: Root layer -> number of its channels.
        notes: What a user should know about how they were found.
    """

    groups: tuple[NeuronGroup, ...]
    left_alone: dict[str, str] = field(default_factory=dict)
    left_alone_sizes: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        groups = [(shortened(group.name, 40), f"{group.size} neurons") for group in self.groups]
        reasons = [
            (shortened(name, 40), f"left alone: {shortened(reason, 60)}")
            for name, reason in self.left_alone.items()
        ]
        neurons = sum(group.size for group in self.groups)
        lines = [
            f"NeuronMap of {neurons} neurons in {len(groups)} groups, {len(reasons)} left alone",
            *listing(groups, 10, "more groups"),
            *listing(reasons, 6, "more left alone"),
        ]
        return "\n".join(lines)

    def without_inside_heads(self) -> NeuronMap:
        """The map with heads that go whole or not at all."""
        return replace(self, groups=tuple(g for g in self.groups if not g.is_inside_heads))

    def without(self, reasons: Mapping[str, str]) -> NeuronMap:
        """The map with some groups left alone, for ``reasons`` by their names."""
        gone = {group.name: group.size for group in self.groups if group.name in reasons}
        return NeuronMap(
            groups=tuple(group for group in self.groups if group.name not in gone),
            left_alone={**self.left_alone, **{name: reasons[name] for name in gone}},
            left_alone_sizes={**self.left_alone_sizes, **gone},
            notes=self.notes,
        )


def covering(name: str, side: Side, neurons: Tensor, axis: int | None = None) -> Member:
    """A member all of whose channels belong to neurons, in the order of the neurons."""
    channels = neurons.argsort(stable=True)
    return Member(name, side, channels, neurons[channels], len(neurons), axis)
