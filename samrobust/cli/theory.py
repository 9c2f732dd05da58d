"""`samrobust theory`: computes, trains, shows and writes."""

import argparse
import itertools
import pathlib
import time
from collections.abc import Callable

from samrobust.cli import flags

__all__ = ["ABOUT", "add_flags", "run"]

_PARTS = 4  # of a study; each takes about as long as a training


ABOUT = {
    "help": "the paper's Section 4, checked: formulas, exact minima, training",
    "description": "Compares Theorems 4.1 to 4.5 with the exact minimum of the loss "
    "over a grid of worlds, trains the first of them, and prints what holds where.",
    "epilog": "Explained in docs/theory.md.",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--p", **flags.REALS, help="accuracy of x_1; default: 0.7,0.95")
    add("--eta", **flags.REALS, help="of the other features; default: 0.1,0.03,0.5")
    add("--d", **flags.REALS, help="number of other features; default: 10,1,100,1000")
    add(
        "--epsilon",
        **flags.REALS,
        help="radii of AT; default: 0.1, 0.3, 0.6 and 0.9 of each eta, at most of 1",
    )
    add("--rho", **flags.REALS, help="radii of SAM; default: 0.1,1,3")
    add("--seeds", **flags.SIZE, help="trained runs; 0 trains nothing; default: 5")
    add("--samples", **flags.COUNT, help="of each run; default: 300000")
    add("--batch-size", **flags.COUNT, help="default: 1000")
    add("--workdir", **flags.FOLDER, default="runs/theory")


def run(arguments: argparse.Namespace, should_stop: Callable[[], bool]) -> int:
    """Checks Section 4 as a command line says; returns the exit code.

    Raises:
      ValueError: for parameters outside the theorems' assumptions.
      InterruptedRunError: when it was stopped; then nothing is written.
    """
    from samrobust.cli.shared import show_written
    from samrobust.experiments.reporting.console import make_console
    from samrobust.experiments.reporting.progress import ProgressDisplay
    from samrobust.studies.theory.experiment import experiment, plan
    from samrobust.studies.theory.figures import draw_all
    from samrobust.studies.theory.report import Findings, to_json, to_sheet
    from samrobust.studies.theory.study import Grid, study
    from samrobust.studies.theory.training import TrainingEffort
    from samrobust.studies.theory.verdicts import judge
    from samrobust.system.files import check_writable, write_json, write_text
    from samrobust.training import InterruptedRunError

    grid, effort = flags.build(Grid, arguments), flags.build(TrainingEffort, arguments)
    console, folder = make_console(), pathlib.Path(arguments.workdir)
    check_writable(folder)
    started, done = time.monotonic(), itertools.count()
    display = ProgressDisplay(console, _PARTS + len(plan(grid, effort)))

    def show(text: str) -> None:
        if should_stop():
            message = "Stopped; nothing is written. Rerun it: it takes about a minute."
            raise InterruptedRunError(message)
        display.show(text, float(next(done)))

    with display.live():
        points = study(grid, on_part=show)
        estimates = list(experiment(grid, effort, on_start=show))
    seconds = time.monotonic() - started
    report = Findings(grid, effort, points, judge(points), estimates, seconds)
    sheet = to_sheet(report)
    console.print(sheet.to_rich())
    write_json(folder / "theory.json", to_json(report))
    write_text(folder / "theory.md", sheet.to_markdown())
    pictures = draw_all(report, folder)
    show_written(console, folder, ["theory.json", "theory.md", *pictures])
    return 0
