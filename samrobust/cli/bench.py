"""`samrobust bench`: plans, measures, shows and writes as it goes."""

import argparse
import collections
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from samrobust.experiments.reporting.console import make_console
from samrobust.experiments.reporting.progress import ProgressDisplay
from samrobust.studies.bench.plan import Options, Task, plan, spec_of
from samrobust.studies.bench.process import Launcher, check_pytorch
from samrobust.studies.bench.report import to_rich, write_report
from samrobust.studies.bench.results import Report, summarise
from samrobust.studies.bench.suite import run_suite
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
    options = Options(
        config=arguments.config,
        overrides=tuple(overrides),
        measure=arguments.measure,
        methods=arguments.methods,
        batch_sizes=arguments.batch_sizes,
        precisions=arguments.precisions,
        devices=arguments.devices,
        steps_per_call=arguments.steps_per_call,
        xla_flags=tuple(arguments.xla_flags or ("",)),
        compare=arguments.compare,
        variants=arguments.variants,
        repeats=arguments.repeats,
        rounds=arguments.rounds,
        min_seconds=arguments.min_seconds,
    )
    tasks = plan(options)
    check_pytorch(options)
    check_writable(pathlib.Path(arguments.workdir))
    console, workdir = make_console(), pathlib.Path(arguments.workdir)
    if arguments.profile:
        return _profile(tasks, options, workdir, console, should_stop)
    outcomes: dict[Task, list[dict[str, Any]]] = collections.defaultdict(list)
    ceilings: dict[str, dict[str, Any]] = {}
    counts: dict[str, Any] = {}

    def report() -> Report:
        made = summarise(tasks, outcomes, ceilings, counts, options)
        command = shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])
        made.provenance["command"] = command
        return made

    def on_outcome(task: Task, outcome: dict[str, Any]) -> None:
        if task.kind == "ceilings":
            ceilings[task.precision] = outcome
        elif task.kind == "counts":
            counts.update(outcome)
        else:
            outcomes[task].append(outcome)
        write_report(report(), workdir)

    precisions = len({task.precision for task in tasks})
    display = ProgressDisplay(console, precisions + 1 + options.rounds * len(tasks))
    with display.live():
        run_suite(
            tasks,
            options,
            on_outcome=on_outcome,
            on_start=lambda name, number, _: display.show(name, float(number)),
            should_stop=should_stop,
        )
    final = report()
    console.print(to_rich(final))
    paths = ", ".join(path.name for path in write_report(final, workdir))
    console.print(f"Written to {workdir}: {paths}")
    return 1 if final.failures else 0


def _profile(
    tasks: Sequence[Task],
    options: Options,
    workdir: pathlib.Path,
    console: Console,
    should_stop: Callable[[], bool],
) -> int:
    """Writes a trace of every row of our own."""
    own = [task for task in tasks if task.kind != "pytorch"]
    with tempfile.TemporaryDirectory(prefix="samrobust-bench-") as cache:
        launch = Launcher(pathlib.Path(cache), should_stop)
        failed = [_trace(task, options, workdir, console, launch) for task in own]
    return 1 if any(failed) else 0


def _trace(
    task: Task,
    options: Options,
    workdir: pathlib.Path,
    console: Console,
    launch: Launcher,
) -> bool:
    """Writes the trace of a row; whether that failed."""
    folder = workdir / "traces" / task.name.replace(", ", "-").replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    spec = spec_of(task, options) | {"trace": True, "path": str(folder)}
    error = launch.worker(spec, task).get("error")
    outcome = f"{task.name}: {error or folder}"
    console.print(outcome)
    return error is not None
