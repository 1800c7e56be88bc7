"""Cut a slice out of a model: its channels, and all that follows them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from nss_prune.graph.slices import Slice
from nss_prune.structures.protocol import Adapter
from nss_prune.surgery.buffers import OwnBuffers
from nss_prune.surgery.execute import Pruners, execute
from nss_prune.surgery.metadata import apply_changes, planned_changes
from nss_prune.surgery.plan import Step

__all__ = ["Pruners", "cut"]


def cut(
    model: nn.Module,
    critical: Slice,
    steps: tuple[Step, ...],
    adapters: Sequence[Adapter],
    buffers: OwnBuffers | None = None,
    customized_pruners: Pruners | None = None,
    *,
    widths: bool = True,
) -> None:
    """Leave of a model what a slice keeps. On an error it is half done: see ``undone_on_error``.

    Args:
        steps: The plan of the slice, by :func:`nss_prune.surgery.plan.plan_removal`.
        adapters: Those with which the neurons were found.
        buffers: Those that hold something for each channel.
        customized_pruners: As torch-pruning takes them.
        widths: Whether attributes that say how wide a module is change too.

    Raises:
        RemovalError: Tied weights would part.
    """
    changes = planned_changes(model, critical, adapters, widths=widths, buffers=buffers)
    execute(model, steps, customized_pruners or {})
    apply_changes(changes)
