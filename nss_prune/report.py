"""What was removed and what it saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nss_prune.neurons import (
    Forward,
    NeuronMap,
    call_model,
    evaluation,
    map_tensors,
    skeleton,
    tensors_in,
    without_values,
)
from nss_prune.slicing import Slice


@dataclass(frozen=True)
class Row:
    """One layer: channels before and after, and why it was left alone ("" where it was not).

    ``unit`` says what is counted.
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


@dataclass(frozen=True)
class Cost:
    """Size of a model: parameters, and multiply-accumulates for the example inputs."""

    parameters: int
    macs: int


@dataclass(frozen=True)
class Report:
    """The result of a pruning step; print it."""

    rows: tuple[Row, ...]
    before: Cost
    after: Cost
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = _table(
            ("layer", "before", "after", "left alone because"),
            [(row.title, str(row.before), str(row.after), row.reason) for row in self.rows],
        )
        lines.append("")
        lines.append(_change("parameters", self.before.parameters, self.after.parameters))
        lines.append(_change("MACs", self.before.macs, self.after.macs))
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)


def report_rows(model: nn.Module, critical: Slice, neurons: NeuronMap) -> tuple[Row, ...]:
    """A row for each layer that has neurons, in the order of the model's modules."""
    rows = {
        group.name: Row(
            group.name,
            group.size * group.ties,
            int(critical.kept[group.name].sum()) * group.ties,
            unit="channels" if group.has_channels else "heads",
        )
        for group in neurons.groups
    }
    for name, reason in neurons.left_alone.items():
        size = neurons.left_alone_sizes[name]
        rows[name] = Row(name, size, size, reason)
    return tuple(rows[name] for name, _ in model.named_modules() if name in rows)


def measure(model: nn.Module, example_inputs: Any, forward: Forward = call_model) -> Cost:
    """Count the parameters, and the multiply-accumulates of one call."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, macs_by_module(model, example_inputs, forward)[""])


def macs_by_module(
    model: nn.Module, example_inputs: Any, forward: Forward = call_model
) -> dict[str, int]:
    """Module -> multiply-accumulates of one call, its children's included; "" is the model.

    Half the floating-point operations that torch counts in convolutions, matrix products and
    attention, whatever the modules are called. Where the model runs on tensors without values,
    nothing is computed.
    """
    try:
        inputs = map_tensors(without_values, example_inputs)
        return _counted(skeleton(model), inputs, forward)
    except Exception:
        if any(parameter.is_meta for parameter in model.parameters()):
            device = next((tensor.device for tensor in tensors_in(example_inputs)), "cpu")
            model = model.to_empty(device=device)
        return _counted(model, example_inputs, forward)


def _counted(model: nn.Module, example_inputs: Any, forward: Forward) -> dict[str, int]:
    counter = FlopCounterMode(display=False)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # The fused kernels of attention are not counted on every device, their parts are.
        with evaluation(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            forward(model, example_inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    root = f"{type(model).__name__}."
    found = {
        name.removeprefix(root): sum(operations.values()) // 2
        for name, operations in counter.get_flop_counts().items()
    }
    return {**found, "": counter.get_total_flops() // 2}


def _change(what: str, before: int, after: int) -> str:
    share = f" ({1 - after / before:.1%} gone)" if before else ""
    return f"{what}: {before:,} -> {after:,}{share}"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for cells in [header, *rows]:
        numbers = [
            cell.rjust(width) if i in (1, 2) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(numbers).rstrip())
    return lines
