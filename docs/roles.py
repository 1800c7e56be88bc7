"""Sphinx's roles and literal blocks in docstrings, as the Markdown that mkdocstrings expects."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([^`]+)`")
LITERAL = re.compile(r"::$", flags=re.MULTILINE)
CODE = re.compile(r"``([^`]+)``")


def as_markdown(text: str) -> str:
    """The text of a docstring in Markdown.

    A paragraph that ends in two colons ends in one, and one that is nothing else goes; the
    indented block after it is code in Markdown as well.
    """
    text = re.sub(r"^\s*::$\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return CODE.sub(r"`\1`", LITERAL.sub(":", ROLE.sub(r"`\1`", text)))


class Roles(griffe.Extension):
    """Rewrites every docstring as it is found."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Of one object."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
