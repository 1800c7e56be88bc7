"""What the report says where a budget or a ratio is not met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nss_prune.allocation.budget import TOLERANCE
from nss_prune.graph.groups import MAKES_THE_OUTPUT
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.slices import Slice
from nss_prune.pruner.subject import Subject


def budgets_shortfall(
    reached: Sequence[tuple[str, float]], budgets: Sequence[float]
) -> tuple[str, ...]:
    """What the report says about budgets of which one is not met, or all could be smaller.

    Args:
        reached: Kind of cost, and the share of it that is kept.
    """
    pairs = list(zip(reached, budgets, strict=True))
    binding = max(share - wanted for (_, share), wanted in pairs)
    return tuple(
        note
        for (kind, share), wanted in pairs
        if share > wanted or share - wanted == binding
        for note in budget_shortfall(kind, wanted, share)
    )


def budget_shortfall(kind: str, wanted: float, reached: float) -> tuple[str, ...]:
    """What the report says about a budget that is not met, in zero or one lines."""
    if abs(reached - wanted) <= TOLERANCE:
        return ()
    why = (
        "all neurons that may go are gone, a tenth of each layer stays; the layers left alone, "
        "the limits and the rest of the model take more"
        if reached > wanted
        else "one more neuron, or the next multiple of round_to, would go beyond it"
    )
    return (f"{reached:.1%} of the {kind} are kept, the budget is {wanted:.1%}: {why}",)


def ratio_shortfall(
    subject: Subject, chosen: Slice, ratio: float, first_sizes: Mapping[str, int]
) -> tuple[str, ...]:
    """What the report says about a ratio that is not met, in zero or one lines.

    Args:
        ratio: Share of the channels of all layers to remove up to this step.
        first_sizes: Layer -> neurons before the first step.
    """
    left_alone = {
        name: size
        for name, size in subject.neurons.left_alone_sizes.items()
        if subject.neurons.left_alone[name] not in (MAKES_THE_OUTPUT, "ignored")
    }
    whole = kept = sum(left_alone.values())
    for group in subject.groups:
        channels = _channels_of_neuron(group)
        whole += channels * first_sizes.get(group.name, group.size)
        kept += channels * int(chosen.kept[group.name].sum())
    gone = 1 - kept / whole if whole else ratio
    if ratio - gone <= TOLERANCE:
        return ()
    heads = [group.name for group in subject.groups if not group.has_channels]
    reasons = [
        *([f"heads go whole, with prune_num_heads ({_some(heads)})"] if heads else []),
        *([f"left alone are {_some(list(left_alone))}"] if left_alone else []),
    ]
    why = "; ".join(reasons) or "the limits, or the union over categories, keep more"
    return (f"{gone:.1%} of the channels are removed, pruning_ratio asks for {ratio:.1%}: {why}",)


def _channels_of_neuron(group: NeuronGroup) -> int:
    """Channels of the root layer in each neuron."""
    if group.has_channels:
        return group.ties
    root = next(member for member in group.members if member.name == group.name)
    return len(root.channels) // group.size


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
