"""``nss-prune check``: what can be pruned, what cannot and why; nothing is changed."""

from __future__ import annotations

import argparse
from html import escape

from nss_prune.cli.console import Console, Outcome, table
from nss_prune.cli.data import example_for
from nss_prune.cli.options import (
    add_model_options,
    add_pruner_options,
    model_source,
    pruner_arguments,
)
from nss_prune.core.replacing import write_text
from nss_prune.core.text import shortened
from nss_prune.graph.costs import measure
from nss_prune.graph.neurons import NeuronGroup, NeuronMap
from nss_prune.pruner.pruner import NSSPruner

STAGES = 2

NAMES = {"out": "makes", "both": "passes on", "in": "consumes"}
COLOURS = {"out": "#2563a8", "both": "#7a8594", "in": "#b4460e"}


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_model_options(parser)
    add_pruner_options(parser)
    parser.add_argument("-o", "--output", metavar="FILE.svg", help="a picture of the structure")


def run(options: argparse.Namespace, console: Console) -> Outcome:
    """The neurons of the model, and the layers that are coupled to them."""
    console.stage(f"loading {options.model}")
    model = model_source(options).load().to(options.device)
    example = example_for(model, options.input_size)
    console.stage("following the model")
    neurons = NSSPruner(model, example, **pruner_arguments(options, model)).neurons
    cost = measure(model, example)
    if options.output:
        write_text(options.output, picture(neurons))
    rows = [
        (shortened(group.name, 40), str(group.size), *(_named(group, side) for side in NAMES))
        for group in neurons.groups
    ]
    lines = [
        f"{cost.parameters:,} parameters, {cost.macs:,} MACs of a call",
        "",
        table(("neurons of", "size", *NAMES.values()), rows),
        "",
        *(f"left alone: {name}: {reason}" for name, reason in neurons.left_alone.items()),
        *(f"note: {note}" for note in neurons.notes),
    ]
    values = {
        "parameters": cost.parameters,
        "macs": cost.macs,
        "groups": [_plain(group) for group in neurons.groups],
        "left_alone": neurons.left_alone,
        "notes": list(neurons.notes),
    }
    todo = f"nss-prune prune {options.model} --data DIR --macs-budget 0.6 -o small.safetensors"
    return Outcome("\n".join(lines), values, todo)


def _names(group: NeuronGroup, side: str) -> list[str]:
    return [member.name for member in group.members if member.side == side]


def _named(group: NeuronGroup, side: str, most: int = 2) -> str:
    names = _names(group, side)
    more = f" +{len(names) - most}" if len(names) > most else ""
    return ", ".join(shortened(name, 28) for name in names[:most]) + more


def _plain(group: NeuronGroup) -> dict[str, object]:
    sides = {NAMES[side].replace(" ", "_"): _names(group, side) for side in NAMES}
    return {"name": group.name, "size": group.size, **sides}


def picture(neurons: NeuronMap) -> str:
    """An SVG with a line for each group: its size as a bar, and the layers coupled to it."""
    height = 26 * len(neurons.groups) + 40
    most = max((group.size for group in neurons.groups), default=1)
    widest = max((len(group.members) for group in neurons.groups), default=0)
    parts = [
        f'<text x="{300 + 110 * i}" y="18" fill="{COLOURS[side]}">{name}</text>'
        for i, (side, name) in enumerate(NAMES.items())
    ]
    for line, group in enumerate(neurons.groups):
        y = 40 + 26 * line
        parts.append(f'<text x="8" y="{y + 4}">{escape(shortened(group.name, 28))}</text>')
        bar = 60 * (group.size / most) ** 0.5
        parts.append(f'<rect x="210" y="{y - 7}" width="{bar:.1f}" height="13" fill="#9db8d6"/>')
        parts.append(f'<text x="274" y="{y + 4}" text-anchor="start">{group.size}</text>')
        for place, member in enumerate(group.members):
            parts.append(
                f'<rect x="{320 + 18 * place}" y="{y - 7}" width="14" height="13" rx="3" '
                f'fill="{COLOURS[member.side]}"><title>{escape(member.name)} '
                f"{NAMES[member.side]}</title></rect>"
            )
    width = max(640, 340 + 18 * widest)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="monospace" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )
