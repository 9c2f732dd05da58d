"""Doctests as blocks of code: in Markdown `>>>` would be three quotations."""

import re
from typing import Any

import griffe

BLOCK = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class Doctests(griffe.Extension):
    """A fence around each doctest."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fences the doctests of a docstring."""
        if obj.docstring:
            fenced = BLOCK.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
            obj.docstring.value = fenced
