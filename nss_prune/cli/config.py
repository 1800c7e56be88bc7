"""Options in a YAML file, read before the command line and written beside each output."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nss_prune.core.replacing import write_text
from nss_prune.errors import ArgumentError

NOT_WRITTEN = ("command", "config", "json", "quiet", "run", "stages")


def read_config(path: str | os.PathLike[str], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Option -> value, checked against the options of a command.

    Raises:
        ArgumentError: The file is no YAML mapping of these options.
        OSError: It cannot be read.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{os.fspath(path)!r} is no YAML: {error}") from error
    if not isinstance(found, Mapping):
        raise ArgumentError(f"{os.fspath(path)!r} is no YAML mapping; write option: value")
    actions = {action.dest: action for action in parser._actions}
    values = {str(name).replace("-", "_"): value for name, value in found.items()}
    unknown = sorted(values.keys() - actions.keys())
    if unknown:
        known = ", ".join(sorted(actions.keys() - {"help", *NOT_WRITTEN}))
        raise ArgumentError(f"{os.fspath(path)!r} has {unknown[0]!r}; this command knows {known}")
    return {name: _checked(actions[name], value) for name, value in values.items()}


def _checked(action: argparse.Action, value: Any) -> Any:
    """A value as the command line would have made it."""
    if value is None or action.type not in (int, float, str):
        return value
    try:
        if isinstance(value, list):
            return [action.type(item) for item in value]  # type: ignore[operator]
        return action.type(value)  # type: ignore[operator]
    except (TypeError, ValueError) as error:
        kind = getattr(action.type, "__name__", "value")
        raise ArgumentError(f"{action.dest} is {value!r}; give one {kind}") from error


def write_config(
    path: str | os.PathLike[str], options: argparse.Namespace, parser: argparse.ArgumentParser
) -> None:
    """Write the options that differ from their defaults, for ``--config``."""
    actions = {action.dest: action.default for action in parser._actions}
    given = {
        name: value
        for name, value in vars(options).items()
        if name in actions and name not in NOT_WRITTEN and value != actions[name]
    }
    command = getattr(options, "command", "")
    text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    write_text(path, f"# nss-prune {command} --config {Path(path).name}\n{text}")
