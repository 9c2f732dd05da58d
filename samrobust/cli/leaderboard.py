"""`samrobust leaderboard`: claims of robustness in small balls, checked and ranked."""

import argparse
import pathlib
from typing import Any

from samrobust.checks import check
from samrobust.cli import flags

__all__ = ["ABOUT", "add_flags", "run"]


ABOUT = {
    "help": "claims at l-inf 1/255 and 2/255, checked against measurements, ranked",
    "description": "Reads the claims of a folder, JSON files in RobustBench's format, "
    "checks each against the table of `samrobust recheck` it rests on, and writes "
    "leaderboard.md. A claim that says what was not measured is refused.",
    "epilog": "docs/interchange.md describes the files.",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--workdir", **flags.DIRECTORY, required=True, help="of the claims")
    new = "also claim the runs of this folder, where `samrobust recheck` was run"
    add("--add", **flags.DIRECTORY, help=new)
    add("--architecture", **flags.TEXT, help="with --add: of the networks")
    note = "with --add: what a reader must know, such as a reduced training set"
    add("--note", **flags.TEXT, help=note)


def run(arguments: argparse.Namespace, stop: Any) -> int:
    """Adds, checks and ranks claims.

    Raises:
      ValueError: for a claim that is not what was measured, and where there is none.
    """
    from samrobust.cli.shared import show_written
    from samrobust.experiments.leaderboard import add_claims, read_claims, to_sheet
    from samrobust.experiments.reporting.console import make_console
    from samrobust.system.files import write_text

    del stop  # it takes seconds
    folder, text = pathlib.Path(arguments.workdir), arguments.architecture
    adds = arguments.add is not None
    check(
        adds == (text is not None) and (adds or arguments.note is None),
        "--add with --architecture, both or none, and --note only with them",
        add=arguments.add,
        architecture=text,
        note=arguments.note,
    )
    if adds:
        add_claims(folder, pathlib.Path(arguments.add), text, arguments.note or "")
    sheet, console = to_sheet(read_claims(folder)), make_console()
    console.print(sheet.to_rich())
    write_text(folder / "leaderboard.md", sheet.to_markdown())
    show_written(console, folder, ["leaderboard.md"])
    return 0
