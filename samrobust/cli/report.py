"""`samrobust report`: all that a folder holds on one page of HTML."""

import argparse
from typing import Any

from samrobust.cli import flags

__all__ = ["ABOUT", "add_flags", "run"]


ABOUT = {
    "help": "tables, pictures and provenance of a folder on one page of HTML",
    "description": "Writes report.html, one page that needs no network, of a table's "
    "or a run's workdir: tables, curves, training, signs of gradient masking, "
    "provenance. What was not measured is left out, and said. Draws the pictures "
    "of the folder again. Measures nothing.",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument(
        "--workdir", **flags.WORKDIR, required=True, help="of a table or of a run"
    )


def run(arguments: argparse.Namespace, stop: Any) -> int:
    """Writes the page.

    Raises:
      ValueError: if nothing was measured in the workdir.
    """
    from samrobust.cli.shared import show_written
    from samrobust.experiments.report import write_report
    from samrobust.experiments.reporting.console import make_console

    del stop  # it takes seconds
    workdir = arguments.workdir
    show_written(make_console(), workdir, write_report(workdir))
    return 0
