"""Tables with notes below, for a Rich console and as Markdown, from one description.

A cell is text as it stands, or Rich's `Text` where something in it stands out: what is
bold on a console is bold in Markdown too, and colors and padding are left out there.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

__all__ = ["Sheet", "TextTable"]


class TextTable(NamedTuple):
    """A table of texts.

    Attributes:
      header: the names of the columns.
      rows: a cell for each column; an empty row is a gap between two groups of rows.
      title: one line; may be empty.
      words: how many of the first columns hold words: these are aligned to the left,
        and where they are several they may be folded. The others hold numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    title: str = ""
    words: int = 1

    def to_rich(self, gap: int = 2) -> Table:
        """Returns the table for a Rich console, its columns `gap` apart."""
        table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
        table.padding = (0, gap - 1, 0, 0)
        table.title, table.title_justify = Text(self.title), "left"
        table.title_style = "bold"
        for number, name in enumerate(self.header):
            side = "left" if number < self.words else "right"
            table.add_column(Text(name), justify=side, no_wrap=True)
            if number < self.words > 1:
                table.columns[-1].no_wrap, table.columns[-1].overflow = False, "fold"
        for row in self.rows:
            if row:
                table.add_row(*(Text() + cell for cell in row))
            else:
                table.add_section()
        return table

    def to_markdown(self) -> str:
        r"""Returns the table as GitHub Markdown, below its title in bold.

        >>> print(TextTable(["row", "n"], [["a|b", Text("3", "bold")]]).to_markdown())
        | row | n |
        | :--- | ---: |
        | a\|b | **3** |
        """
        sides = (":---" if i < self.words else "---:" for i in range(len(self.header)))
        body = [map(_in_markdown, row) for row in self.rows if row]
        lines = [map(_in_markdown, self.header), sides, *body]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{self.title}**\n\n{table}" if self.title else table


class Sheet(NamedTuple):
    """Tables, and the sentences to be read with them.

    Attributes:
      tables: one below the other.
      notes: a sentence or two each.
    """

    tables: Sequence[TextTable]
    notes: Sequence[str]

    def to_rich(self) -> Group:
        """Returns the sheet for a Rich console, the notes dimmed."""
        parts = [part for table in self.tables for part in (table.to_rich(), Text())]
        return Group(*parts, Text("\n".join(self.notes), "dim"))

    def to_markdown(self) -> str:
        """Returns the sheet as GitHub Markdown."""
        parts = [*(table.to_markdown() for table in self.tables), *self.notes]
        return "\n\n".join(parts) + "\n"


def _in_markdown(cell: str | Text) -> str:
    """Returns a cell on one line, in which nothing but what is bold is markup."""
    text = Text() + cell
    edges = {edge for span in text.spans for edge in (span.start, span.end)}
    shown = ""
    for piece in text.divide(sorted(edges)):
        plain = re.sub(r"[|*_]", r"\\\g<0>", piece.plain)
        is_bold = any("bold" in str(span.style) for span in piece.spans)
        shown += f"**{plain}**" if is_bold and plain else plain
    return " ".join(shown.split())
