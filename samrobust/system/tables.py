"""Tables with notes below, for a Rich console, Markdown and HTML, from one description.

A cell is text as it stands, or Rich's `Text` where something in it stands out: what is
bold on a console is bold in Markdown and HTML too, which leave out colors and padding.
"""

import csv
import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

__all__ = ["Sheet", "TextTable", "csv_text"]


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
        return f"**{_in_markdown(self.title)}**\n\n{table}" if self.title else table

    def to_html(self) -> str:
        """Returns the table in HTML, in a box that scrolls where a screen is narrow.

        >>> print(TextTable(["row", "n"], [["a<b", Text("3", "bold")]]).to_html())
        <div class="wide"><table>
        <thead><tr><th>row</th><th class="number">n</th></tr></thead>
        <tbody>
        <tr><td>a&lt;b</td><td class="number"><b>3</b></td></tr>
        </tbody>
        </table></div>
        """
        rows = [_html_row("td", row, self.words) if row else _GAP for row in self.rows]
        caption = f"<caption>{html.escape(self.title)}</caption>\n" * bool(self.title)
        head = _html_row("th", self.header, self.words)
        return (
            f'<div class="wide"><table>\n{caption}<thead>{head}</thead>\n'
            f"<tbody>\n{chr(10).join(rows)}\n</tbody>\n</table></div>"
        )


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns lines of comma-separated values; None is empty."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


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
        notes = (re.sub(_TAG, r"\\\g<0>", note) for note in self.notes)
        parts = [*(table.to_markdown() for table in self.tables), *notes]
        return "\n\n".join(parts) + "\n"

    def to_html(self) -> str:
        """Returns the sheet in HTML."""
        notes = (f"<p>{html.escape(note)}</p>" for note in self.notes)
        return "\n".join([*(table.to_html() for table in self.tables), *notes])


_GAP = "</tbody><tbody>"
# Of GitHub Markdown in a line: emphasis and cells, code, tags and comments, links.
_TAG = r"<(?=[A-Za-z/!?])"
_MARKUP = re.compile(rf"[\\|*_`]|{_TAG}|\](?=[(\[])|~(?=~)")


def _html_row(tag: str, cells: Sequence[str | Text], words: int) -> str:
    kinds = ["" if i < words else ' class="number"' for i in range(len(cells))]
    shown = [
        f"<{tag}{kind}>{_in_html(cell)}</{tag}>"
        for kind, cell in zip(kinds, cells, strict=True)
    ]
    return f"<tr>{''.join(shown)}</tr>"


def _shown(cell: str | Text, escape: Callable[[str], str], begin: str, end: str) -> str:
    """Returns a cell on one line, in which nothing but what is bold is markup."""
    text, shown = Text() + cell, ""
    edges = {edge for span in text.spans for edge in (span.start, span.end)}
    for piece in text.divide(sorted(edges)):
        escaped = escape(piece.plain)
        if escaped and any("bold" in str(span.style) for span in piece.spans):
            escaped = f"{begin}{escaped}{end}"
        shown += escaped
    return " ".join(shown.split())


def _in_markdown(cell: str | Text) -> str:
    return _shown(cell, lambda text: _MARKUP.sub(r"\\\g<0>", text), "**", "**")


def _in_html(cell: str | Text) -> str:
    return _shown(cell, html.escape, "<b>", "</b>")
