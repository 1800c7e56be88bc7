"""``module:name`` -> what it names."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

from nss_prune.errors import ArgumentError

_PATTERN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_object(text: Any) -> bool:
    """Whether this is written as ``module:name``."""
    return isinstance(text, str) and _PATTERN.fullmatch(text) is not None


def imported(text: str) -> Any:
    """What ``module:name`` names, in the current folder or where Python finds it.

    Raises:
        ArgumentError: There is no such module or name.
    """
    if not is_object(text):
        raise ArgumentError(f"{text!r} is not written as module:name; give my_file:my_function")
    module, _, name = text.partition(":")
    if "" not in sys.path and "." not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(
            f"{text!r} cannot be imported: {error}; give module:name of what Python finds in the "
            "current folder, on PYTHONPATH or among the packages"
        ) from error
    return found


def made(text: str) -> Any:
    """What ``module:name`` names; of a class an object, made without arguments."""
    found = imported(text)
    return found() if isinstance(found, type) else found
