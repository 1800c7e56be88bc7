"""Predicted divergence over size, with the point that was chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 22, 38


def curve(points: Sequence[Point], chosen: Point | None, cost: str) -> str:
    """A picture of points (share of the cost kept, nats), the nats on a logarithmic axis.

    Args:
        chosen: The point of the model at hand.
    """
    shown = [(share, nats) for share, nats in points if nats > 0]
    marked = [chosen] if chosen is not None and chosen[1] > 0 else []
    if len(shown) < 2:
        return ""
    nats = [value for _, value in (*shown, *marked)]
    low, high = math.floor(math.log10(min(nats))), math.ceil(math.log10(max(nats)))
    low = min(low, high - 1)

    def place(point: Point) -> tuple[float, float]:
        across = LEFT + point[0] * (WIDTH - LEFT - RIGHT)
        height = (math.log10(point[1]) - low) / (high - low)
        return across, HEIGHT - BOTTOM - height * (HEIGHT - TOP - BOTTOM)

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, shown))
    parts = [
        *_decades(low, high),
        *_shares(),
        f'<polyline points="{path}" style="fill:none;stroke:var(--kept);stroke-width:2"/>',
        *(_mark(*place(point), point) for point in marked),
    ]
    label = f"Predicted divergence over the share of the {cost} that is kept"
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'<text x="{LEFT}" y="12">nats a sample</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">'
        f"share of the {escape(cost)} kept</text>{''.join(parts)}</svg>"
    )


def _decades(low: int, high: int) -> list[str]:
    step = max(1, (high - low) // 5)
    lines = []
    for decade in range(low, high + 1, step):
        y = HEIGHT - BOTTOM - (decade - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        lines.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            f'style="stroke:var(--line)"/><text x="{LEFT - 5}" y="{y + 4:.1f}" '
            f'text-anchor="end">{10.0**decade:g}</text>'
        )
    return lines


def _shares() -> list[str]:
    return [
        f'<text x="{LEFT + share / 100 * (WIDTH - LEFT - RIGHT):.1f}" y="{HEIGHT - BOTTOM + 15}" '
        f'text-anchor="middle">{share} %</text>'
        for share in (20, 40, 60, 80, 100)
    ]


def _mark(x: float, y: float, point: Point) -> str:
    share, nats = point
    # The curve falls: above it, to the right, there is room.
    anchor = "start" if x < WIDTH * 0.7 else "end"
    shift = 8 if anchor == "start" else -8
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" style="fill:var(--mark)"/>'
        f'<text class="chosen" x="{x + shift:.1f}" y="{max(y - 8, TOP):.1f}" '
        f'text-anchor="{anchor}">{share:.0%}, {nats:.3g} nats</text>'
    )
