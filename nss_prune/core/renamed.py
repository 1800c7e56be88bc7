"""Old names of arguments, which work for a version longer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping
from typing import Any

from nss_prune.errors import ArgumentError


def with_new_names(
    given: MutableMapping[str, Any], names: Mapping[str, str], present: Mapping[str, Any]
) -> dict[str, Any]:
    """Take old names out of keywords, with a warning.

    Args:
        given: Keywords by any name; the old ones are removed.
        names: Old name -> new name.
        present: New name -> the value given by it, None where it was not.

    Returns:
        New name -> value, for all of ``present``.

    Raises:
        ArgumentError: Both names of an argument are given.
    """
    values = dict(present)
    for old, new in names.items():
        if old not in given:
            continue
        value = given.pop(old)
        if values[new] is not None:
            raise ArgumentError(f"{old}= is the old name of {new}=; give {new}= alone")
        warn_renamed(f"{old}=", f"{new}=", stacklevel=5)
        values[new] = value
    return values


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn of an old name that goes with the next version."""
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=stacklevel)
