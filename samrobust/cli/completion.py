"""`samrobust completion`: commands, flags and their choices, completed in a shell.

Prints a script made from the parsers, so that nothing starts when a key is pressed.
"""

import argparse
from collections.abc import Iterator

__all__ = ["add", "run"]

# Readline takes what stands behind an `=` for a word of its own, and replaces that
# alone. Zsh, through its bashcompinit, does neither.
_SCRIPT = """\
_samrobust() {{
  local line="${{COMP_LINE:0:$COMP_POINT}}" words="{commands}"
  local word="${{line##* }}"
  [ "$COMP_CWORD" -gt 1 ] && case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  case "$COMP_WORDBREAKS" in
    *=*) COMPREPLY=("${{COMPREPLY[@]#"${{word%"${{word##*=}}"}}"}}") ;;
  esac
  case "${{COMPREPLY[*]}}" in *=) compopt -o nospace 2>/dev/null ;; esac
}}
complete -o default {options}-F _samrobust samrobust
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its argument."""
    parser = commands.add_parser(
        "completion",
        help="tab completion in bash and zsh",
        description="Prints a script that completes commands, flags and choices. In "
        'your ~/.bashrc: eval "$(samrobust completion bash)"',
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(parsers=commands.choices)  # of all commands, once all are added


def run(arguments: argparse.Namespace) -> int:
    """Prints the script for a shell; returns the exit code."""
    parsers = arguments.parsers
    cases = [
        f'    {name}) words="{" ".join(_words(parser))}" ;;'
        for name, parser in parsers.items()
    ]
    zsh = arguments.shell == "zsh"
    script = _SCRIPT.format(
        commands=" ".join(("help", *parsers)),
        cases="\n".join(cases),
        options="-o nospace " * zsh,
    )
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
