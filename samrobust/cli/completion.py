"""`samrobust completion`: commands, flags and their choices, completed in a shell.

Prints a script made from the parsers, so that nothing starts when a key is pressed.
Readline takes what stands behind an `=` for a word of its own, and replaces that alone;
so does the script in bash. Zsh, through its bashcompinit, does neither.
"""

import argparse
import pathlib
from collections.abc import Iterator

__all__ = ["ABOUT", "add_flags", "run"]

ABOUT = {
    "help": "tab completion in bash and zsh",
    "description": "Prints a script that completes commands, flags and choices. In "
    'your ~/.bashrc: eval "$(samrobust completion bash)"',
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the argument of the command."""
    parser.add_argument("shell", choices=("bash", "zsh"))


def run(arguments: argparse.Namespace) -> int:
    """Prints the script for a shell; returns the exit code."""
    parsers = arguments.parsers
    cases = [
        f'    {name}) words="{" ".join(_words(parser))}" ;;'
        for name, parser in parsers.items()
    ]
    zsh = arguments.shell == "zsh"
    script = pathlib.Path(__file__).with_suffix(".sh").read_text(encoding="utf-8")
    for name, text in (
        ("COMMANDS", " ".join(("help", *parsers))),
        ("CASES", "\n".join(cases)),
        ("OPTIONS", "-o nospace " * zsh),
    ):
        script = script.replace(f"@{name}@", text)
    print("autoload -U +X bashcompinit && bashcompinit\n" * zsh + script, end="")
    return 0


def _words(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yields the flags of a command, those with choices once for each."""
    for action in parser._actions:
        for flag in action.option_strings or [""]:
            if action.nargs == 0:  # a switch
                yield flag
            elif flag:
                yield from (f"{flag}={choice}" for choice in action.choices or [""])
            else:
                yield from map(str, action.choices or [])
