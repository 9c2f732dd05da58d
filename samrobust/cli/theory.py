"""`samrobust theory`: computes, trains, shows and writes."""

import argparse
import dataclasses
import itertools
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from samrobust.checks import check
from samrobust.experiments.reporting.console import make_console
from samrobust.experiments.reporting.progress import ProgressDisplay
from samrobust.studies.theory.experiment import experiment, plan
from samrobust.studies.theory.figures import draw_all
from samrobust.studies.theory.report import Findings, to_json, to_markdown, to_rich
from samrobust.studies.theory.study import Grid, study
from samrobust.studies.theory.training import TrainingEffort
from samrobust.studies.theory.verdicts import judge
from samrobust.system.files import check_writable, write_json, write_text
from samrobust.training import InterruptedRunError

__all__ = ["theory_command"]

_PARTS = 4  # of a study; each takes about as long as a training
_T = TypeVar("_T", Grid, TrainingEffort)


def theory_command(
    arguments: argparse.Namespace,
    overrides: Sequence[str],
    should_stop: Callable[[], bool],
) -> int:
    """Checks Section 4 as a command line says; returns the exit code.

    Raises:
      ValueError: for parameters outside the theorems' assumptions.
      InterruptedRunError: when it was stopped; then nothing is written.
    """
    check(not overrides, "no --config flags for theory", config=overrides)
    grid, effort = _from_flags(Grid, arguments), _from_flags(TrainingEffort, arguments)
    console, folder = make_console(), pathlib.Path(arguments.workdir)
    check_writable(folder)
    started, done = time.monotonic(), itertools.count()
    display = ProgressDisplay(console, _PARTS + len(plan(grid, effort)))

    def show(text: str) -> None:
        if should_stop():
            message = "Stopped. It takes about a minute: start it again."
            raise InterruptedRunError(message)
        display.show(text, float(next(done)))

    with display.live():
        points = study(grid, on_part=show)
        estimates = list(experiment(grid, effort, on_start=show))
    command = shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])
    seconds = time.monotonic() - started
    report = Findings(grid, effort, points, judge(points), estimates, seconds, command)
    console.print(to_rich(report))
    write_json(folder / "theory.json", to_json(report))
    write_text(folder / "theory.md", to_markdown(report))
    pictures = draw_all(grid.world, points, estimates, effort.batch_size, folder)
    names = ["theory.json", "theory.md", *(path.name for path in pictures)]
    console.print(f"Written to {folder}: {', '.join(names)}")
    return 0


def _from_flags(kind: type[_T], arguments: argparse.Namespace) -> _T:
    """Builds an object from the flags that were given; its defaults for the others."""
    names = [field.name for field in dataclasses.fields(kind)]
    given = {name: getattr(arguments, name) for name in names}
    return kind(**{name: value for name, value in given.items() if value is not None})
