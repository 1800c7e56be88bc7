"""A model card: README.md of a pruned model, with what was measured of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from nss_prune.pruner.page.text import milliseconds, slower
from nss_prune.pruner.report import Report


def model_card(name: str, config: Mapping[str, Any], report: Report | None) -> str:
    """The text of README.md.

    Args:
        name: Of the model.
        config: Of config.json.
        report: Of the pruning, or None where it is not known.
    """
    head = {"library_name": "nss_prune", "tags": ["pruning", "nss_prune", "torch-pruning"]}
    architecture = config.get("architecture")
    if architecture:
        head["tags"] = [*head["tags"], "timm"]
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"{architecture or 'A model'}, made smaller by removing neurons with nss_prune.",
        "",
        "```python",
        "from nss_prune import from_pretrained",
        "",
        f'model = from_pretrained("{name}"{"" if architecture else ", model=whole"})',
        "```",
        "",
        *([] if report is None else _figures(report)),
    ]
    return "\n".join(lines)


def _figures(report: Report) -> Iterator[str]:
    figures = report.figures
    yield from ("| | whole model | this model |", "| --- | ---: | ---: |")
    yield f"| parameters | {report.before.parameters:,} | {report.after.parameters:,} |"
    yield f"| MACs of a call | {report.before.macs:,} | {report.after.macs:,} |"
    if figures.latency is not None:
        before, after = map(milliseconds, figures.latency)
        yield f"| latency of a call in torch | {before} | {after} |"
    if figures.accuracy is not None:
        yield "| accuracy | {:.2%} | {:.2%} |".format(*figures.accuracy)
    yield ""
    if slower(figures.latency):
        yield "It was not faster on the machine that pruned it.\n"
    if figures.divergence is not None:
        yield f"Predicted divergence of the outputs: {figures.divergence:.4g} nats a sample.\n"
    pruned = sum(row.after < row.before for row in report.rows)
    yield f"{pruned} of {len(report.rows)} layers are narrower.\n"
    yield from (f"- {note}" for note in report.notes)
    if figures.command:
        yield f"\n```sh\n{figures.command}\n```"
    if figures.versions:
        yield ""
        yield ", ".join(f"{package} {version}" for package, version in figures.versions.items())
    yield ""
