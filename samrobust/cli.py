"""The `samrobust` command: parses, and hands over.

Exit codes: 0 done; 1 a run failed, or is missing from a collected table; 2 bad input,
or another process works in the directory; 69 another process of this run is gone; 75
stopped by SIGTERM, 130 by Ctrl-C. After the last three the same command goes on.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from samrobust import __version__
from samrobust.checks import shorten
from samrobust.flags import ADDERS

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit code."""
    arguments, overrides = _parse(sys.argv[1:] if argv is None else list(argv))
    if arguments.command == "status":
        from samrobust.status import status_command

        return status_command(arguments)
    from samrobust import commands  # JAX and Flax load here: --help stays quick

    return commands.execute(arguments, overrides)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(
            2, f"samrobust: error: {shorten(message, 600)} (see `{self.prog} --help`)\n"
        )


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of a subcommand, and the overrides `--config.FIELD=VALUE`."""
    parser = _make_parser()
    arguments, unknown = parser.parse_known_args(argv)
    overrides = [item for item in unknown if item.startswith("--config.")]
    for item in unknown:
        if item not in overrides:
            parser.error(f"unknown argument {item!r}")
        if "=" not in item:
            parser.error(f"write {item}=VALUE, with an equals sign")
        if arguments.command == "status":
            parser.error(f"status takes no config, and so not {item!r}")
    return arguments, overrides


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="samrobust",
        allow_abbrev=False,
        description="Train image classifiers that hold up under attack (standard "
        "training, SAM, PGD adversarial training) and measure what they are worth.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )
    for add in ADDERS:
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
