"""What the stages of the steps took, as lines of text and as rows of a frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nss_prune.pruner.figures import Figures
from nss_prune.pruner.page.document import Step
from nss_prune.pruner.page.text import megabytes, short

STAGE_COLUMNS = ["step", "stage", "seconds", "memory", "divergence", "parameters", "macs"]


def spent_lines(figures: Figures) -> list[str]:
    """Seconds and memory of each stage, as far as they are known."""
    lines = []
    if figures.seconds:
        stages = ", ".join(f"{name} {spent:.1f}" for name, spent in figures.seconds.items())
        lines.append(f"seconds: {stages}")
    if figures.memory:
        stages = ", ".join(f"{name} {megabytes(size)}" for name, size in figures.memory.items())
        lines.append(f"peak memory raised by: {stages}")
    return lines


def step_line(number: int, step: Step) -> str:
    """What a step left, and what it took."""
    figures = step.figures
    parts = [f"{short(step.after.parameters)} parameters, {short(step.after.macs)} MACs left"]
    if figures.divergence is not None:
        parts.append(f"predicted divergence {figures.divergence:.4g} nats a sample")
    parts.append(f"{sum(figures.seconds.values()):.1f} s")
    if figures.memory:
        parts.append(f"peak memory +{megabytes(sum(figures.memory.values()))}")
    return f"step {number}: {'; '.join(parts)}"


def stage_rows(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """A row for each stage of each step, under :data:`STAGE_COLUMNS`; None where not known."""
    return [
        {
            "step": number,
            "stage": name,
            "seconds": seconds,
            "memory": step.figures.memory.get(name),
            "divergence": step.figures.divergence,
            "parameters": step.after.parameters,
            "macs": step.after.macs,
        }
        for number, step in enumerate(steps, 1)
        for name, seconds in step.figures.seconds.items()
    ]
