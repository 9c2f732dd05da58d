"""Where a command shows things: one console, that takes every text as it is.

Names and paths are a user's: `[red]` or `:smile:` in them is no markup.
"""

from typing import Any

from rich.console import Console

from samrobust.system.runtime import OutputError, leave_terminal

__all__ = ["make_console"]


def make_console(*, quiet: bool = False) -> Console:
    """Returns a console on standard output; a quiet one shows nothing."""
    return _Console(quiet=quiet, markup=False, emoji=False, highlight=False)


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            if not leave_terminal():  # a run goes on without one
                raise OutputError(error) from None

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError
