"""The `samrobust` command: parses, and hands over to a command's `run`.

Exit codes: 0 done; 1 a run failed, or is missing from a collected table, or the output
could not be written; 2 bad input; 69 another process of this run died, or works in the
directory, or a disk or network is away; 75 stopped by SIGTERM, 130 by Ctrl-C. After the
last three, rerun the same command to resume; `bench` begins again.
"""

import argparse
import contextlib
import difflib
import importlib
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, NoReturn

from samrobust import __version__
from samrobust.checks import shorten
from samrobust.system import runtime

__all__ = ["COMMANDS", "main"]

# Each has its flags in `add_flags` and its body in `run`, which alone imports JAX.
COMMANDS = {
    name: importlib.import_module(f"{__name__}.{name.replace('import', 'import_')}")
    for name in (
        *("table", "train", "estimate", "status", "evaluate", "recheck", "curves"),
        *("sharpness", "report", "config", "doctor", "bench", "theory", "export"),
        *("import", "leaderboard", "completion"),
    )
}
_WITHOUT_JAX = ("status", "doctor", "completion")  # or with any JAX that there is


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit code.

    Args:
      argv: of the subcommand; by default the process's own, which then ends with it.
    """
    if argv is None:
        argv = sys.argv[1:]
        _open_streams()
        runtime.end_on_signals()
        runtime.collect_garbage_seldom()
    with _whole_output():
        return _run(list(argv))


def _run(argv: list[str]) -> int:
    arguments = _parse(argv)
    command = COMMANDS[arguments.command]
    try:
        if arguments.command in _WITHOUT_JAX:
            return command.run(arguments)
        try:
            import jax  # noqa: F401
        except (ImportError, RuntimeError, ValueError) as error:
            # As of JAX_ENABLE_X64=maybe, or a jaxlib of another version.
            runtime.say(f"error: Expected a JAX that loads, got: {error}")
            return runtime.BAD_INPUT
        from samrobust.cli.running import execute

        return execute(command.run, arguments)
    except ModuleNotFoundError as error:  # after `pip install --no-deps samrobust`
        runtime.say(
            f"error: Expected the package {error.name} for `samrobust "
            f"{arguments.command}`, got none. Install all: pip install samrobust"
        )
        return runtime.BAD_INPUT


def _open_streams() -> None:
    """Opens standard streams that are closed: a run's file would get their number."""
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
    """Exits with code 1 if the output of its block could not all be written."""
    problem = None
    try:
        yield
    except OSError as error:  # of `print`: commands handle all others
        problem = error
    except runtime.OutputError as error:
        problem = error.problem
    finally:
        _flush(sys.stderr)
        problem = _flush(sys.stdout) or problem
        if problem is not None:
            if not isinstance(problem, BrokenPipeError):  # `| head` has read enough
                runtime.say(f"error: standard output cannot be written: {problem}")
            raise SystemExit(runtime.FAILED) from None


def _flush(stream: IO[str] | None) -> OSError | None:
    """Flushes a stream; drops what cannot be written, or Python would complain."""
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
    """A parser with errors of one line, that takes no abbreviations."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is not None and file is sys.stdout:
            file.write(message)  # argparse would swallow its errors
        elif message:
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        self.exit(
            2, f"samrobust: error: {shorten(message, 600)} (see `{self.prog} --help`)\n"
        )


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parses a command line; `overrides` are its flags `--config.FIELD=VALUE`.

    Without a command, or with `help`, it is that of `--help`.
    """
    parser, commands = _make_parser()
    if argv[:1] in ([], ["help"]):
        argv = [*argv[1:], "--help"]
    name = argv[0]
    if not name.startswith("-") and name not in commands:
        meant, known = _meant(name, commands), ", ".join(commands)
        parser.error(f"unknown command {name!r}.{meant} Commands: {known}")
    arguments, unknown = parser.parse_known_args(argv)
    for item in unknown:
        if not item.startswith("--config."):
            own = commands[arguments.command]
            flags = [flag for each in own._actions for flag in each.option_strings]
            fix = _meant(item.partition("=")[0], flags)
            if not fix and "--config" in flags:
                fix = " Fields of the config are flags --config.SECTION.NAME=VALUE"
                fix = fix if item.startswith("-") else f" Did you mean --config={item}?"
            own.error(f"unknown argument {item!r}.{fix}")
        if "=" not in item:
            parser.error(f"write {item}=VALUE, with an equals sign")
        if not hasattr(arguments, "config"):
            parser.error(f"{arguments.command} takes no --config, got {item!r}")
    arguments.overrides = unknown
    return arguments


def _meant(name: str, known: Iterable[str]) -> str:
    """Returns a question that ends a message, where a name is nearly one of others."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {near[0]}?" if near else ""


def _make_parser() -> tuple[_Parser, dict[str, _Parser]]:
    """Returns the parser, and those of the commands by their names."""
    parser = _Parser(
        prog="samrobust",
        description="Train image classifiers that withstand attacks (standard "
        "training, SAM, PGD adversarial training) and measure their robustness.",
    )
    version = f"samrobust {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_flags(commands.add_parser(name, **command.ABOUT))
    commands.choices["completion"].set_defaults(parsers=commands.choices)
    return parser, commands.choices  # pyright: ignore[reportReturnType]
