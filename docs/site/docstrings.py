"""Docstrings as Markdown: there, lines that open with `>` would be quotations."""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
BOUND = re.compile(r"(?<=: )>(?=[= ])")


class Docstrings(griffe.Extension):
    """Fences around doctests, and bounds like `rho: >= 0` as text."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of an object."""
        if obj.docstring:
            text = DOCTEST.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
            obj.docstring.value = BOUND.sub(r"\\>", text)
