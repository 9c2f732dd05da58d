"""`samrobust status`: the progress of a table or a run, while others work on it.

Loads no JAX, writes nothing.
"""

import argparse
import signal
import time

from samrobust.cli import flags
from samrobust.system.failures import is_transient
from samrobust.system.files import WorkdirError
from samrobust.system.runtime import BAD_INPUT, EXIT_CODES, TRANSIENT, say

__all__ = ["ABOUT", "add_flags", "run"]

_REFRESH = 5.0  # seconds


ABOUT = {
    "help": "which runs are done, running, failed; time left",
    "description": "Shows the runs of a table, or one run: state, epochs, loss, "
    "accuracy, ETA of the training, and the last error. Changes nothing.",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--workdir", **flags.WORKDIR, required=True, help="of a table or of a run")
    add("--watch", action="store_true", help="refresh until all runs are done")


def run(arguments: argparse.Namespace) -> int:
    """Shows the states once, or until all runs are done; returns the exit code.

    Watching outlasts a disk or a network that is away for a while.
    """
    from samrobust.experiments.reporting.console import make_console
    from samrobust.experiments.reporting.status import status_to_rich
    from samrobust.experiments.survey import survey

    console = make_console()
    try:
        while True:
            try:
                runs = survey(arguments.workdir)
            except WorkdirError as error:
                say(f"error: {error}")
                if not is_transient(error):
                    return BAD_INPUT
                if not arguments.watch:
                    return TRANSIENT
            else:
                if arguments.watch:
                    console.clear()  # does nothing where there is no terminal
                console.print(status_to_rich(runs))
                if not arguments.watch or all(run.state == "done" for run in runs):
                    return 0
            time.sleep(_REFRESH)
    except KeyboardInterrupt:  # where a caller left Python's own handler
        return EXIT_CODES[signal.SIGINT]
