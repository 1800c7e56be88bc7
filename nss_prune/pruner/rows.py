"""The rows of a report: each layer's neurons before and after, and why it was left alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from nss_prune.core.models import submodule
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.slices import Slice
from nss_prune.pruner.classes import KEPT_CLASSES
from nss_prune.pruner.subject import Subject
from nss_prune.structures.attention import HEADS

NOT_FOLLOWED = "not followed: it runs without gradients, in another part, or not in this call"

HEADER = ("layer", "before", "after", "left alone because")


@dataclass(frozen=True)
class Row:
    """One layer: channels before and after, and why it was left alone ("" where it was not).

    Attributes:
        unit: What is counted: "channels", "heads" of attention, "dimensions of a head", the same
            in every head, or "units" of several channels.
    """

    layer: str
    before: int
    after: int
    reason: str = ""
    unit: str = "channels"

    @property
    def title(self) -> str:
        """The layer, with the unit where it is not channels."""
        return self.layer if self.unit == "channels" else f"{self.layer} ({self.unit})"

    @property
    def cells(self) -> tuple[str, ...]:
        """What a table shows, under :data:`HEADER`."""
        return self.title, str(self.before), str(self.after), self.reason


def report_rows(subject: Subject, chosen: Slice) -> tuple[Row, ...]:
    """A row for each layer that has neurons, in the order of the model's modules."""
    rows = {
        group.name: Row(
            group.name,
            group.size * group.ties,
            int(chosen.kept[group.name].sum()) * group.ties,
            unit=_unit(subject.model, group),
        )
        for group in subject.groups
    }
    for name, reason in subject.neurons.left_alone.items():
        size = subject.neurons.left_alone_sizes[name]
        rows[name] = Row(name, size, _width(subject.model, name, size), reason)
    for name, size in _unknown(subject).items():
        rows.setdefault(name, Row(name, size, size, NOT_FOLLOWED))
    return tuple(rows[name] for name, _ in subject.model.named_modules() if name in rows)


def actual_rows(rows: tuple[Row, ...], model: nn.Module) -> tuple[Row, ...]:
    """Rows with the channels that the layers have now, whatever was planned."""
    return tuple(replace(row, after=_channels(row, model)) for row in rows)


def _channels(row: Row, model: nn.Module) -> int:
    layer = model.get_submodule(row.layer)
    if row.unit != "channels" or not isinstance(layer, (nn.Linear, _ConvNd)):
        return row.after
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def combined_rows(steps: tuple[tuple[Row, ...], ...]) -> tuple[Row, ...]:
    """Rows of several steps: channels before the first and after the last that has the layer."""
    found: dict[str, Row] = {}
    for rows in steps:
        for row in rows:
            first = found.get(row.layer, row)
            found[row.layer] = replace(row, before=first.before)
    return tuple(found.values())


def _width(model: nn.Module, name: str, before: int) -> int:
    """The channels of a layer that was left alone; a head may have lost some of its classes."""
    layer = submodule(model, name)
    return len(getattr(layer, KEPT_CLASSES, ())) or before


def _unit(model: nn.Module, group: NeuronGroup) -> str:
    """What the neurons of a group are called."""
    if group.has_channels:
        return "channels"
    if group.is_inside_heads:
        return "dimensions of a head"
    around = submodule(model, group.name.rpartition(".")[0])
    return "heads" if any(hasattr(around, name) for name in HEADS) else "units"


def _unknown(subject: Subject) -> dict[str, int]:
    """Layers that tracing did not come to, and their channels."""
    known = {member.name for group in subject.groups for member in group.members}
    traced = set() if subject.graph is None else set(subject.graph.module2node)
    return {
        name: layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        for name, layer in subject.model.named_modules()
        if isinstance(layer, (nn.Linear, _ConvNd)) and name not in known and layer not in traced
    }
