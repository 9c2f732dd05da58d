"""The files of a table: table.md, table.csv, table.json and table.png."""

import functools
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from samrobust.experiments.reporting.plot import plot
from samrobust.experiments.reporting.render import to_csv, to_json, to_markdown
from samrobust.experiments.reporting.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["atomically", "write_figure", "write_table"]


def write_table(
    table: Table, directory: str | os.PathLike[str], name: str = "table"
) -> tuple[Path, ...]:
    """Writes a table in all its forms, and makes the directory if needed.

    Returns:
      The paths of table.md, table.csv, table.json and table.png, or of files of
      another `name`. **Guarantees**: a reader finds each file complete, the old one or
      the new one, at any moment.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    texts = {"md": to_markdown, "csv": to_csv, "json": to_json}
    paths = []
    for suffix, render in texts.items():
        paths.append(directory / f"{name}.{suffix}")
        text = render(table).encode()
        atomically(paths[-1], functools.partial(Path.write_bytes, data=text))
    paths.append(directory / f"{name}.png")
    atomically(paths[-1], functools.partial(plot, table))
    return tuple(paths)


def write_figure(figure: "Figure", directory: Path, name: str) -> tuple[Path, ...]:
    """Writes a picture as PNG and PDF, each in one step; returns the paths.

    The same numbers give the same files: they carry no date.
    """
    paths = []
    for suffix in ("png", "pdf"):
        paths.append(directory / f"{name}.{suffix}")
        metadata = {"CreationDate": None} if suffix == "pdf" else None
        save = functools.partial(figure.savefig, metadata=metadata, facecolor="white")
        atomically(paths[-1], save)
    return tuple(paths)


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` write a file beside `path`, then puts it in place of `path`."""
    beside = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
