"""A slice -> the channels to remove from each module, checked before anything changes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nss_prune.errors import RemovalError
from nss_prune.graph.axes import check_fits
from nss_prune.graph.neurons import Member
from nss_prune.graph.norms import least_neurons
from nss_prune.graph.slices import Slice


@dataclass(frozen=True)
class Step:
    """Channels to remove from one side of one module (or bare parameter)."""

    member: Member
    channels: Tensor


def plan_removal(critical: Slice, model: nn.Module) -> tuple[Step, ...]:
    """What to remove where, checked against the model, which is not touched.

    Raises:
        ModelMismatchError: The model does not have the layers of the slice.
        RemovalError: A module would be left without channels, or a norm over them with a single
            one, which it would make a constant.
    """
    check_fits(critical.groups, model)
    _check_norms(critical, model)
    steps = []
    for member, channels in critical.removed_channels().values():
        if len(channels.unique()) != len(channels):
            raise RemovalError(f"channels of {member.name} were to go twice: {channels.tolist()}")
        if len(channels) >= member.width:
            raise RemovalError(
                f"all {member.width} channels of {member.name} were to go; use a larger theta"
            )
        steps.append(Step(member, channels))
    return tuple(steps)


def _check_norms(critical: Slice, model: nn.Module) -> None:
    for group in critical.groups:
        if group.name not in critical.removed:
            continue
        least, left = least_neurons(group, model), int(critical.kept[group.name].sum())
        if left < least:
            raise RemovalError(
                f"{left} of the {group.size} neurons of {group.name} were to stay; a norm over "
                f"them needs {least} at least: two channels in each of its groups"
            )
