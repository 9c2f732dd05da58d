"""`samrobust config`: every field of a row's config, its value and its meaning."""

import argparse
import textwrap
from collections.abc import Callable
from itertools import groupby

from samrobust.cli import flags

__all__ = ["ABOUT", "add_flags", "run"]


ABOUT = {
    "help": "every field of a config, its value and what it means",
    "description": "Prints the fields that count for a row, as it would be trained. "
    "Each may be changed on the command line of `table` and `train`.",
    "epilog": flags.ANY_FIELD,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add, words = parser.add_argument, "default: %(default)s"
    add("--config", **flags.ONE_ROW, default="configs/digits.py", help=words)


def run(arguments: argparse.Namespace, stop: Callable[[], bool]) -> int:
    """Prints the fields; returns the exit code.

    Raises:
      ValueError: for a file, row, field or value that is not valid.
    """
    del stop
    from rich.text import Text

    from samrobust.experiments import configuration, explaining
    from samrobust.experiments.reporting.console import make_console

    config = configuration.load_config(arguments.config, arguments.overrides)
    console = make_console()
    fields = explaining.explain(config)
    for section, group in groupby(fields, lambda field: field.name.partition(".")[0]):
        console.print(Text(section, style="bold"))
        for name, value, meaning in group:
            console.print(Text(f"  {name} = {value!r}"), soft_wrap=True)
            if meaning:
                said = textwrap.fill(meaning, console.width - 6)
                console.print(Text(textwrap.indent(said, " " * 6), style="dim"))
    return 0
