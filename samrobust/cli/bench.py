"""`samrobust bench`: plans, measures, shows and writes as it goes."""

import argparse
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from samrobust.experiments.reporting.console import make_console
from samrobust.experiments.reporting.progress import ProgressDisplay
from samrobust.studies.bench.plan import Options, Task, plan
from samrobust.studies.bench.report import to_sheet, write_report
from samrobust.studies.bench.results import summarize
from samrobust.studies.bench.suite import Launcher, Outcome, schedule
from samrobust.system.files import check_writable

__all__ = ["bench_command"]


def bench_command(
    arguments: argparse.Namespace,
    overrides: Sequence[str],
    should_stop: Callable[[], bool],
) -> int:
    """Runs the bench of a command line; returns the exit code, 1 if a row failed.

    What is measured is written after every process, so that nothing is lost when the
    bench is stopped.
    """
    given: dict[str, Any] = vars(arguments) | {"overrides": tuple(overrides)}
    given["xla_flags"] = tuple(arguments.xla_flags or ("",))
    options = Options(**{f.name: given[f.name] for f in dataclasses.fields(Options)})
    tasks, workdir = plan(options), pathlib.Path(arguments.workdir)
    check_writable(workdir)
    console, failed = make_console(), False
    with tempfile.TemporaryDirectory(prefix="samrobust-bench-") as folder:
        launch = Launcher(options, pathlib.Path(folder), should_stop)
        if arguments.profile:
            for task in tasks:
                if task.kind != "pytorch":
                    place = task.name.replace(", ", "-").replace(" ", "_")
                    traces = workdir / "traces" / place
                    traces.mkdir(parents=True, exist_ok=True)
                    error = launch(task, traces).get("error")
                    console.print(f"{task.name}: {error or traces}")
                    failed |= error is not None
            return int(failed)
        outcomes: dict[Task, list[Outcome]] = {}
        order = schedule(tasks, options.rounds)
        display = ProgressDisplay(console, len(order))
        with display.live():
            for number, (name, task) in enumerate(order):
                display.show(name, float(number))
                outcomes.setdefault(task, []).append(launch(task))
                write_report(summarize(outcomes, options), workdir)
    report = summarize(outcomes, options)
    console.print(to_sheet(report).to_rich())
    paths = ", ".join(path.name for path in write_report(report, workdir))
    console.print(f"Written to {workdir}: {paths}")
    return 1 if report.failures else 0
