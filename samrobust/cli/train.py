"""`samrobust train`: one row, trained and attacked."""

import argparse
from collections.abc import Callable

from samrobust.cli import flags
from samrobust.system.runtime import RESUME

__all__ = ["ABOUT", "add_flags", "run"]


ABOUT = {
    "help": "one row: train, attack, write result.json",
    "description": f"Trains and attacks one row. {RESUME}",
    "epilog": flags.ANY_FIELD,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--config", **flags.ONE_ROW, required=True, help="configs/digits.py:st")
    add("--workdir", **flags.WORKDIR, required=True, help="of this run")


def run(arguments: argparse.Namespace, stop: Callable[[], bool]) -> int:
    """Trains and attacks one row, or resumes where it was stopped.

    Raises:
      InterruptedRunError: if it was asked to stop.

    And as `samrobust.experiments.run.run`.
    """
    from samrobust.cli import shared
    from samrobust.experiments import building, configuration
    from samrobust.experiments.rehearsal import rehearse
    from samrobust.experiments.reporting.progress import ProgressDisplay
    from samrobust.experiments.run import PlannedRun, run as run_row, work
    from samrobust.experiments.tracking import check_trackers

    config = configuration.load_config(arguments.config, arguments.overrides)
    check_trackers(config, arguments.workdir)
    should_stop, console = shared.join(stop)
    planned = PlannedRun(config, arguments.workdir)
    shared.await_holder(planned.workdir, console, should_stop)
    dataset = building.load_data(config)
    rehearse(config, dataset)
    works = work(config, dataset)
    display = ProgressDisplay(console, sum(works))
    with display.live():
        result = run_row(
            config,
            planned.workdir,
            display.run(planned.name, *works),
            dataset=dataset,
            should_stop=should_stop,
        )
    shared.show_accuracies(console, planned.name, result["accuracy"])
    shared.show_notes(console, planned.workdir)
    shared.show_written(console, planned.workdir, ["result.json"])
    return 0
