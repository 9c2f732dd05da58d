"""`samrobust status`: how far a table or a run is, while others work on it.

Loads no JAX, writes nothing.
"""

import argparse
import pathlib
import sys
import time

from rich.console import Console

from samrobust.files import WorkdirError
from samrobust.reporting.status import status_to_rich
from samrobust.survey import survey

__all__ = ["status_command"]

_REFRESH = 5.0  # seconds
_BAD_INPUT, _CTRL_C = 2, 130


def status_command(arguments: argparse.Namespace) -> int:
    """Shows the states once, or until all runs are done; returns the exit code."""
    workdir = pathlib.Path(arguments.workdir)
    try:
        if arguments.watch:
            _watch(workdir, Console())
        else:
            Console().print(status_to_rich(survey(workdir)))
    except WorkdirError as error:
        print(f"samrobust: error: {error}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        return _CTRL_C
    return 0


def _watch(workdir: pathlib.Path, console: Console) -> None:
    while True:
        runs = survey(workdir)
        console.clear()  # does nothing where there is no terminal
        console.print(status_to_rich(runs))
        if all(run.state == "done" for run in runs):
            return
        time.sleep(_REFRESH)
