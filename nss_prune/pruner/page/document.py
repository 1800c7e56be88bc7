"""The page: its parts, each of them only where something is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Protocol

from nss_prune.graph.costs import Cost
from nss_prune.pruner.figures import Figures
from nss_prune.pruner.page.bars import bars
from nss_prune.pruner.page.curve import curve
from nss_prune.pruner.page.heat import category_map, sensitivity_map
from nss_prune.pruner.page.style import STYLE
from nss_prune.pruner.page.text import (
    latency_sentence,
    megabytes,
    milliseconds,
    short,
    slower,
)
from nss_prune.pruner.rows import Row

SENSITIVITY = (
    "Predicted divergence, in nats a sample, with this share of the layer's neurons gone and "
    "nothing else."
)

MEMORY = "Memory: by how much a stage raised the peak of the process, or of the GPU."


class Step(Protocol):
    """What the page shows of a step, see :class:`nss_prune.Report`."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """Of each layer."""
        ...

    @property
    def before(self) -> Cost:
        """Of the whole model."""
        ...

    @property
    def after(self) -> Cost:
        """Of the smaller one."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know."""
        ...

    @property
    def figures(self) -> Figures:
        """What else is known."""
        ...


class Reported(Step, Protocol):
    """What the page shows, see :class:`nss_prune.Report`."""

    @property
    def steps(self) -> Sequence[Step]:
        """That it adds up; empty for one."""
        ...


def page(report: Reported, title: str) -> str:
    """The whole document."""
    return _document(title, f"{_cards(report)}{''.join(_sections(report))}")


def sensitivity_page(table: Mapping[str, Mapping[float, float]], title: str) -> str:
    """A document with nothing but the heat map: layer -> share of its neurons gone -> nats."""
    return _document(title, _section("Nats a sample", SENSITIVITY, sensitivity_map(table)))


def _document(title: str, body: str) -> str:
    """Args: body: HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{body}</main></body></html>\n"
    )


def _sections(report: Reported) -> Iterator[str]:
    figures = report.figures
    if figures.latency is not None and slower(figures.latency):
        text = escape(latency_sentence(figures.latency))
        yield f'<section class="warning"><h2>Not faster</h2><p>{text}.</p></section>'
    if report.notes:
        yield _section("Notes", "", _list(report.notes))
    yield _section(
        "Neurons of each layer",
        '<span class="key" style="background:var(--kept)"></span>kept, '
        '<span class="key" style="background:var(--gone)"></span>removed. '
        "Lengths are square roots of widths.",
        bars(report.rows),
    )
    chosen = None
    if figures.kept is not None and figures.divergence is not None:
        chosen = figures.kept, figures.divergence
    if drawn := curve(figures.curve, chosen, figures.cost):
        about = "How far the outputs are predicted to move, folding included, for any budget."
        yield _section("Predicted divergence over size", about, drawn)
    if figures.sensitivity:
        drawn = sensitivity_map(figures.sensitivity)
        yield _section("Sensitivity of each layer", SENSITIVITY, drawn)
    if figures.categories:
        about = "Share of each category's contribution that the neurons kept carry."
        yield _section("Categories by layer", about, category_map(figures.categories))
    if left := _left_alone(report.rows):
        yield _section("Left alone, and why", "", left)
    if report.steps:
        yield _section("Steps", "", _steps(report.steps))
    if figures.seconds:
        yield _section("Seconds and memory of each stage", MEMORY, _stages(figures))
    if figures.command or figures.versions:
        versions = ", ".join(f"{name} {version}" for name, version in figures.versions.items())
        yield _section(
            "How it was made",
            escape(versions),
            f"<pre><code>{escape(figures.command)}</code></pre>",
        )


def _section(title: str, about: str, content: str) -> str:
    """Args: about, content: HTML."""
    note = f'<p class="quiet">{about}</p>' if about else ""
    return f"<section><h2>{escape(title)}</h2>{note}{content}</section>"


def _cards(report: Reported) -> str:
    figures, before, after = report.figures, report.before, report.after
    cards = [
        _card("parameters", short(before.parameters), short(after.parameters),
              _gone(before.parameters, after.parameters)),
        _card("MACs of a call", short(before.macs), short(after.macs),
              _gone(before.macs, after.macs)),
    ]  # fmt: skip
    if figures.latency is not None:
        whole, smaller = figures.latency
        fast = f"{whole / smaller:.2f} x as fast" if smaller else ""
        kind = "bad" if slower(figures.latency) else "good"
        cards.append(_card("latency", milliseconds(whole), milliseconds(smaller), fast, kind=kind))
    if figures.accuracy is not None:
        whole, smaller = figures.accuracy
        cards.append(
            _card("accuracy", f"{whole:.1%}", f"{smaller:.1%}",
                  f"{100 * (smaller - whole):+.1f} points")
        )  # fmt: skip
    if figures.divergence is not None:
        text = "predicted, nats a sample"
        cards.append(
            f'<div class="card"><span class="quiet">divergence</span><b>{figures.divergence:.3g}'
            f'</b><span class="quiet">{text}</span></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(what: str, before: str, after: str, share: str, *, kind: str = "quiet") -> str:
    return (
        f'<div class="card"><span class="quiet">{escape(what)}</span><b>{escape(after)}</b>'
        f'<span class="quiet">from {escape(before)}</span>'
        f'<br><span class="{kind}">{escape(share)}</span></div>'
    )


def _gone(before: int, after: int) -> str:
    return f"{1 - after / before:.1%} gone" if before else ""


def _left_alone(rows: Sequence[Row]) -> str:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.reason:
            reasons.setdefault(row.reason, []).append(f"{row.title} ({row.before})")
    items = [
        f'<li>{escape(reason)}: <span class="layer">{escape(", ".join(layers))}</span></li>'
        for reason, layers in reasons.items()
    ]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _stages(figures: Figures) -> str:
    rows = [
        [name, f"{spent:.1f}", _bytes(figures, name)] for name, spent in figures.seconds.items()
    ]
    rows.append(["all", f"{sum(figures.seconds.values()):.1f}", _bytes(figures)])
    return _table(["stage", "seconds", "memory"], rows)


def _bytes(figures: Figures, name: str | None = None) -> str:
    """Of a stage, or of all."""
    if not figures.memory:
        return ""
    size = sum(figures.memory.values()) if name is None else figures.memory.get(name, 0)
    return f"+{megabytes(size)}"


def _steps(steps: Sequence[Step]) -> str:
    stages = list(dict.fromkeys(name for step in steps for name in step.figures.seconds))
    header = ["step", "parameters", "MACs", "nats", *(f"{name}, s" for name in stages), "memory"]
    rows = []
    for number, step in enumerate(steps, 1):
        nats = step.figures.divergence
        rows.append([
            str(number),
            short(step.after.parameters),
            short(step.after.macs),
            "" if nats is None else f"{nats:.3g}",
            *(f"{step.figures.seconds.get(name, 0.0):.1f}" for name in stages),
            _bytes(step.figures),
        ])  # fmt: skip
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in header)
    lines = (f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>" for cells in rows)
    return f'<div class="scroll"><table><tr>{titles}</tr>{"".join(lines)}</table></div>'
