"""Groups whose sums fit into memory together, with the consumers that are watched with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nss_prune.allocation.sensitivity import sole_consumer
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.statistics.memory import group_bytes, parts_within


@dataclass(frozen=True)
class GroupPart:
    """What one pass adds up.

    Attributes:
        groups: Whose sensitivities are summed.
        consumers: Whose inputs are summed with them.
        bytes: That all this takes.
    """

    groups: tuple[NeuronGroup, ...]
    consumers: tuple[str, ...]
    bytes: int


def parts_of(
    groups: Sequence[NeuronGroup], consumers: Mapping[str, int], limit: float
) -> list[GroupPart]:
    """The groups in their order, in as few parts as the limit allows.

    Args:
        consumers: Consumer -> bytes of its sums; each goes with the first of its groups.
        limit: Bytes of the sums of a part; a group that takes more is a part itself.
    """
    left = dict(consumers)
    single = []
    for group in groups:
        own = tuple(member.name for member in group.consumers if member.name in left)
        own = tuple(dict.fromkeys(own))
        watched = sum(left.pop(name) for name in own)
        activations = 0 if sole_consumer(group) in own else group_bytes(group)
        single.append(GroupPart((group,), own, group_bytes(group) + activations + watched))
    return [_together(part) for part in parts_within(single, lambda part: part.bytes, limit)]


def _together(parts: Sequence[GroupPart]) -> GroupPart:
    return GroupPart(
        tuple(group for part in parts for group in part.groups),
        tuple(name for part in parts for name in part.consumers),
        sum(part.bytes for part in parts),
    )
