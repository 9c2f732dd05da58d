"""The `samrobust` command: parses, and hands over.

Exit codes: 0 done; 1 a run failed, or is missing from a collected table, or what was
shown could not be written; 2 bad input, or another process works in the directory; 69
another process of this run is gone; 75 stopped by SIGTERM, 130 by Ctrl-C. After the
last three the same command goes on.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any, NoReturn

from samrobust import __version__
from samrobust.checks import shorten
from samrobust.cli.flags import ADDERS
from samrobust.system.runtime import OutputError, end_on_signals, say

__all__ = ["main"]

_FAILED, _BAD_INPUT = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit code.

    Args:
      argv: of the subcommand; by default the process's own, which then ends with it.
    """
    if argv is not None:
        with _whole_output():
            return _run(list(argv))
    _open_streams()
    with _whole_output():
        end_on_signals()
        return _run(sys.argv[1:])


def _run(argv: list[str]) -> int:
    arguments, overrides = _parse(argv)
    if arguments.command == "status":
        from samrobust.cli.status import status_command

        return status_command(arguments)
    try:  # here, lest --help wait for it
        import jax  # noqa: F401
    except (ImportError, RuntimeError, ValueError) as error:
        # As of JAX_ENABLE_X64=maybe, or a jaxlib of another version.
        say(f"error: Expected a JAX that loads, got: {error}")
        return _BAD_INPUT
    from samrobust.cli import commands

    return commands.execute(arguments, overrides)


def _open_streams() -> None:
    """Gives closed standard streams a place, lest a file of a run get their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no Unicode
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _whole_output() -> Iterator[None]:
    """Ends with code 1 if what was shown inside could not all be written."""
    problem = None
    try:
        yield
    except OSError as error:  # of `print`: commands answer for all others
        problem = error
    except OutputError as error:
        problem = error.problem
    finally:
        _flush(sys.stderr)
        problem = _flush(sys.stdout) or problem
        if problem is not None:
            if not isinstance(problem, BrokenPipeError):  # `| head` has read enough
                say(f"error: standard output cannot be written: {problem}")
            raise SystemExit(_FAILED) from None


def _flush(stream: IO[str] | None) -> OSError | None:
    """Writes what is left, or throws it away lest Python complain of it at the end."""
    if stream is None:
        return None
    try:
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # a stream that is no file's
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        if file is not None and file is sys.stdout:
            file.write(message)  # an error of which argparse would swallow
        elif message:
            super()._print_message(message, file)

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
