"""``nss-prune report``: the HTML page of a run, from the file that ``prune`` wrote beside it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nss_prune.cli.console import Console, Outcome
from nss_prune.errors import ArgumentError, FileFormatError
from nss_prune.pruner.report import Report

STAGES = 1


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add = parser.add_argument
    add("run_file", nargs="?", metavar="FILE.json", help="what prune wrote beside the model")
    add("-o", "--output", metavar="FILE.html", help="where the page is written")
    add("--title", default="Pruning report")


def run(options: argparse.Namespace, console: Console) -> Outcome:
    """Read the run, and write the page where one is asked for."""
    if not options.run_file:
        raise ArgumentError("no run is given; pass the FILE.json that prune wrote")
    console.stage(f"reading {options.run_file}")
    try:
        values = json.loads(Path(options.run_file).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{options.run_file!r} is no JSON: {error}") from error
    report = Report.from_dict(values)
    if options.output:
        report.to_html(options.output, options.title)
    todo = f"open {options.output}" if options.output else "-o report.html writes a page"
    return Outcome(str(report), report.to_dict(), todo)
