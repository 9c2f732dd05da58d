"""`samrobust status`: how far a table or a run is, while others work on it.

Loads no JAX, writes nothing.
"""

import argparse
import pathlib
import signal
import time

from rich.console import Console

from samrobust.experiments.reporting.console import make_console
from samrobust.experiments.reporting.status import status_to_rich
from samrobust.experiments.survey import survey
from samrobust.system.files import WorkdirError
from samrobust.system.runtime import EXIT_CODES, say

__all__ = ["status_command"]

_REFRESH = 5.0  # seconds
_BAD_INPUT = 2


def status_command(arguments: argparse.Namespace) -> int:
    """Shows the states once, or until all runs are done; returns the exit code."""
    workdir, console = pathlib.Path(arguments.workdir), make_console()
    try:
        if arguments.watch:
            _watch(workdir, console)
        else:
            console.print(status_to_rich(survey(workdir)))
    except WorkdirError as error:
        say(f"error: {error}")
        return _BAD_INPUT
    except KeyboardInterrupt:  # where a caller left Python's own handler
        return EXIT_CODES[signal.SIGINT]
    return 0


def _watch(workdir: pathlib.Path, console: Console) -> None:
    while True:
        runs = survey(workdir)
        console.clear()  # does nothing where there is no terminal
        console.print(status_to_rich(runs))
        if all(run.state == "done" for run in runs):
            return
        time.sleep(_REFRESH)
