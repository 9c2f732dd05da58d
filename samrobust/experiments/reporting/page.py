"""A page of HTML that needs nothing but itself: style and pictures are inside.

It has no script and asks for nothing over the network, which its content security
policy holds. It is read in the light and in the dark, on a screen and on a phone: what
is wider than the page scrolls by itself.
"""

import base64
import html
import pathlib
from collections.abc import Mapping, Sequence

__all__ = ["picture", "render_page"]

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = pathlib.Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
_PNG_SIZE = slice(16, 24)  # width and height, four bytes each
_SCALE = 1.5  # dots of a picture beside each other in a pixel of the page


def picture(path: pathlib.Path, alt: str) -> str:
    """Returns a PNG file as a part of a page, in its own size."""
    content = path.read_bytes()
    size = content[_PNG_SIZE]
    width, height = (round(int.from_bytes(x) / _SCALE) for x in (size[:4], size[4:]))
    data = base64.b64encode(content).decode()
    return (
        f'<div class="wide"><img width="{width}" height="{height}" '
        f'alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></div>'
    )


def render_page(title: str, notes: Sequence[str], sections: Mapping[str, str]) -> str:
    """Returns the page.

    Args:
      title: plain text.
      notes: what is said before the sections, plain text.
      sections: HTML by titles, in order; each has a link at the top.
    """
    links = [
        f'<a href="#part{number}">{html.escape(name)}</a>'
        for number, name in enumerate(sections)
    ]
    parts = [
        f'<section id="part{number}">\n<h2>{html.escape(name)}</h2>\n'
        f"{content}\n</section>"
        for number, (name, content) in enumerate(sections.items())
    ]
    said = [f"<p>{html.escape(note)}</p>" for note in notes]
    body = [f"<h1>{html.escape(title)}</h1>", *said, f"<nav>{' '.join(links)}</nav>"]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n"
        f"<body>\n{chr(10).join([*body, *parts])}\n</body>\n</html>\n"
    )
