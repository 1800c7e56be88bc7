"""The command line: parse, run one command, and turn what is raised into an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from nss_prune.cli.commands import (
    check,
    evaluate,
    export,
    finetune,
    profile,
    prune,
    report,
    sensitivity,
)
from nss_prune.cli.config import read_config
from nss_prune.cli.console import Console, give
from nss_prune.cli.options import add_common_options
from nss_prune.cli.versions import command_line
from nss_prune.errors import ArgumentError, NSSPruneError

DONE, REFUSED, USAGE, INTERRUPTED = 0, 1, 2, 130

# A command is a module with add, run and STAGES; a further one is one more line here.
COMMANDS: dict[str, ModuleType] = {
    "check": check,
    "profile": profile,
    "sensitivity": sensitivity,
    "prune": prune,
    "finetune": finetune,
    "evaluate": evaluate,
    "export": export,
    "report": report,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: By default those of the process.

    Returns:
        0, or 1 where something was refused, 2 where the command line is wrong, 130 after Ctrl-C.
        Files are written whole or not at all.
    """
    parser, commands = _parsers()
    try:
        options = parser.parse_args(arguments)
        own = commands[options.command]
        if options.config:
            own.set_defaults(**read_config(options.config, own))
            options = parser.parse_args(arguments)
    except SystemExit as left:
        return int(left.code or 0)
    except (NSSPruneError, OSError) as error:
        return _refused(error, USAGE)
    options.command_line = command_line(arguments)
    options.parser = _parsers()[1][options.command]
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    command = COMMANDS[options.command]
    console = Console(command.STAGES, options.quiet)
    try:
        with console.listening():
            outcome = command.run(options, console)
    except KeyboardInterrupt:
        print("interrupted; files are whole or as they were", file=sys.stderr)
        return INTERRUPTED
    except ArgumentError as error:
        return _refused(error, USAGE)
    except (NSSPruneError, OSError) as error:
        return _refused(error, REFUSED)
    give(outcome, options.json)
    return DONE


def _refused(error: Exception, code: int) -> int:
    print(f"nss-prune: {error}", file=sys.stderr)
    return code


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole parser, and that of each command."""
    parser = argparse.ArgumentParser(
        prog="nss-prune", description="Structured pruning of PyTorch models by meaning."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    own = {}
    for name, module in COMMANDS.items():
        text = (module.__doc__ or "").partition(": ")[2].strip()
        own[name] = commands.add_parser(name, help=text, description=text)
        module.add(own[name])
        add_common_options(own[name])
    return parser, own
