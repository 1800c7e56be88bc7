"""A slice -> the channels to remove from each module, checked before anything changes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nss_prune.errors import RemovalError
from nss_prune.graph.axes import check_fits
from nss_prune.graph.neurons import Member
from nss_prune.graph.slices import Slice


@dataclass(frozen=True)
class Step:
    """Channels to remove from one side of one module (or bare parameter)."""

    member: Member
    channels: Tensor


def plan_removal(critical: Slice, model: nn.Module) -> tuple[Step, ...]:
    """What to remove where, checked against the model, which is not touched.

    What a layer makes goes first: that leaves less to copy where it loses inputs, too.

    Raises:
        ModelMismatchError: The model does not have the layers of the slice.
        RemovalError: A module would be left without channels.
    """
    check_fits(critical.groups, model)
    steps = []
    for member, channels in critical.removed_channels().values():
        if len(channels.unique()) != len(channels):
            raise RemovalError(f"channels of {member.name} were to go twice: {channels.tolist()}")
        if len(channels) >= member.width:
            raise RemovalError(
                f"all {member.width} channels of {member.name} were to go; use a larger theta"
            )
        steps.append(Step(member, channels))
    return tuple(sorted(steps, key=lambda step: step.member.side == "in"))
