"""Draws overview.svg: what semantic slicing does to a network.

python docs/figures/overview.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

COLOURS = {"a": "#3b7dd8", "b": "#e08a1e", "c": "#2f9e6e"}
LEFT, WIDTH, HEIGHT, RADIUS = 30, 860, 320, 11
LAYERS = (
    ("abc", "", "a", "b", "", "c", "bc", ""),
    ("", "ab", "", "c", "", "abc", "", "a"),
    ("b", "", "ac", "", "", "bc", "", ""),
)
"""For each neuron of each layer, the categories that need it."""


def circle(x: float, y: float, categories: str) -> Iterator[str]:
    """A neuron, in the colours of its categories; dashed where it has none."""
    if not categories:
        yield (
            f'<circle cx="{x}" cy="{y}" r="{RADIUS}" fill="none" stroke="#999" '
            'stroke-dasharray="3 3"/>'
        )
        return
    step = 2 * RADIUS / len(categories)
    name = f"clip{x:.0f}-{y:.0f}"
    yield (f'<clipPath id="{name}"><circle cx="{x}" cy="{y}" r="{RADIUS}"/></clipPath>')
    for number, category in enumerate(categories):
        yield (
            f'<rect clip-path="url(#{name})" x="{x - RADIUS + number * step:.1f}" '
            f'y="{y - RADIUS}" width="{step:.1f}" height="{2 * RADIUS}" '
            f'fill="{COLOURS[category]}"/>'
        )


def network(left: float, layers: tuple[tuple[str, ...], ...]) -> Iterator[str]:
    """Columns of neurons, each connected with all of the next."""
    places = [
        [(left + 95 * column, HEIGHT / 2 - 15 + 30 * (row - (len(layer) - 1) / 2))
         for row in range(len(layer))]
        for column, layer in enumerate(layers)
    ]  # fmt: skip
    for column in range(len(layers) - 1):
        for here, needed in zip(places[column], layers[column], strict=True):
            for there, also in zip(places[column + 1], layers[column + 1], strict=True):
                shade = "#b8c4d0" if needed and also else "#ececec"
                yield (
                    f'<line x1="{here[0]}" y1="{here[1]}" x2="{there[0]}" y2="{there[1]}" '
                    f'stroke="{shade}"/>'
                )
    for layer, where in zip(layers, places, strict=True):
        for (x, y), categories in zip(where, layer, strict=True):
            yield f'<circle cx="{x}" cy="{y}" r="{RADIUS}" fill="#fff"/>'
            yield from circle(x, y, categories)


def text(x: float, y: float, words: str, size: int = 14, colour: str = "#333") -> str:
    """Centred words."""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="middle">'
        f"{words}</text>"
    )


def overview() -> str:
    """The picture."""
    kept = tuple(tuple(neuron for neuron in layer if neuron) for layer in LAYERS)
    middle = HEIGHT / 2 - 15
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="sans-serif"><title>Neurons that no category needs are removed; those that '
        "stay are given the weights that make up for them.</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>',
        *network(LEFT + 40, LAYERS),
        text(LEFT + 135, HEIGHT - 14, "which neurons does each category need?"),
        *network(WIDTH - 260, kept),
        text(WIDTH - 165, HEIGHT - 14, "physically smaller, folded, verified"),
    ]
    x = WIDTH / 2 - 25
    parts.append(f'<path d="M{x - 55} {middle} h90 m-12 -8 l12 8 l-12 8" fill="none" stroke="#555" '
                 'stroke-width="2.5"/>')  # fmt: skip
    parts.append(text(x - 10, middle - 16, "NSSPruner.step()", 13))
    for number, (category, name) in enumerate(zip("abc", ("cat", "dog", "ship"), strict=True)):
        y = middle + 34 + 22 * number
        parts.append(f'<circle cx="{x - 40}" cy="{y - 4}" r="6" fill="{COLOURS[category]}"/>')
        parts.append(text(x, y, name, 13))
    parts.append(f'<circle cx="{x - 40}" cy="{middle + 96}" r="6" fill="none" stroke="#999" '
                 'stroke-dasharray="3 3"/>')  # fmt: skip
    parts.append(text(x, middle + 100, "none", 13))
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    (Path(__file__).parent / "overview.svg").write_text(overview(), "utf-8")
