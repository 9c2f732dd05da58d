"""`samrobust estimate`: time, memory and cost of a table before it runs."""

import argparse
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from samrobust.cli import flags
from samrobust.cli.planning import add_plan_flags, make_plan
from samrobust.system.runtime import FAILED

if TYPE_CHECKING:
    from samrobust.studies.estimate import TableEstimate
    from samrobust.system.tables import Sheet

__all__ = ["ABOUT", "add_flags", "run"]


ABOUT = {
    "help": "time, memory and cost of a table before it runs",
    "description": "Times a few steps of each different program of a table on this "
    "device and adds up its runs, with their evaluation. The flags are those of "
    "`samrobust table`; runs that have finished cost nothing. Images are "
    "synthetic: nothing is downloaded.",
    "epilog": flags.ANY_FIELD,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add_plan_flags(parser)
    add = parser.add_argument
    devices = (
        "identical devices that share the runs, with one worker each, as with "
        "launch/local.py --each; default: one worker on all devices of this machine"
    )
    add("--devices", **flags.FEW, help=devices)
    add("--price-per-hour", **flags.POSITIVE, help="of a device, in any currency")


def run(arguments: argparse.Namespace, stop: Callable[[], bool]) -> int:
    """Shows the estimate; returns the exit code, 1 if a row could not be timed.

    Raises:
      ValueError: for flags, rows, fields or values that are not valid.
      InterruptedRunError: if it was asked to stop.
    """
    from samrobust.experiments.reporting.console import make_console
    from samrobust.experiments.reporting.progress import ProgressDisplay
    from samrobust.studies.estimate import estimate, tasks_of, time_tasks

    plan, console = make_plan(arguments), make_console()
    share = plan.runs[plan.shard]
    runs = [planned for planned in share if not planned.has_result]
    if not runs:
        console.print(f"All {len(share)} runs have finished.")
        return 0
    tasks = tasks_of(
        runs,
        devices=1 if arguments.devices else 0,
        seeds_per_program=min(arguments.seeds_per_program, arguments.seeds),
    )
    display = ProgressDisplay(console, len(tasks))
    with display.live(), tempfile.TemporaryDirectory(prefix="samrobust-") as folder:
        outcomes = time_tasks(
            *(tasks, arguments.config, arguments.overrides, pathlib.Path(folder)),
            on_task=lambda number, name: display.show(name, float(number)),
            should_stop=stop,
        )
    found = estimate(runs, tasks, outcomes, workers=arguments.devices or 1)
    sheet = _to_sheet(found, len(share) - len(runs), arguments.price_per_hour)
    console.print(sheet.to_rich(), soft_wrap=True)
    return FAILED if found.failures else 0


def _to_sheet(found: "TableEstimate", done: int, price: float | None) -> "Sheet":
    from samrobust.experiments.reporting.status import duration
    from samrobust.system.tables import Sheet, TextTable

    header = ("row", "timed", "runs", "training", "evaluation", "all its runs", "GB")
    cells: list[Sequence[str]] = [
        (
            *(row.label, ", then ".join(row.timed), str(row.runs)),
            *map(duration, (row.training(), row.evaluation, row.total)),
            f"{row.memory / 1e9:.1f}",
        )
        for row in found.rows
    ]
    notes = [f"failed: {name}: {why}" for name, why in found.failures]
    left = f"{sum(row.runs for row in found.rows)} runs"
    left += f" ({done} more have finished)" if done else ""
    notes.append(
        f"{left} on {found.devices} x {found.device}: {duration(found.seconds)}."
    )
    if price is not None:
        cost = found.devices * found.seconds / 3600 * price
        notes.append(
            f"Cost: {cost:,.2f}, at {price:g} an hour for each device until the last "
            "run ends."
        )
    notes.append(
        "Assumed: steps with as many passes of each kind take as long as the row that "
        "was timed for them; a checkpoint an epoch; attacks where no image breaks "
        "early; every program compiled once. Left out: start of processes, decoding "
        "of data, judging of held-out images after epochs, other work on the device."
    )
    return Sheet([TextTable(header, cells, words=2)] if cells else [], notes)
