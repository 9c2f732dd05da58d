"""`samrobust bench`: plans, measures, shows and writes as it goes."""

import argparse
import pathlib
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

from samrobust.checks import check
from samrobust.cli import flags
from samrobust.system.runtime import FAILED

if TYPE_CHECKING:
    from samrobust.studies.bench.plan import Options, Task
    from samrobust.studies.bench.suite import Outcome

__all__ = ["add", "run"]


def add(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "bench",
        help="how fast training is, beside its FLOPs, the paper and PyTorch",
        description="Times training steps, epochs and evaluations, each row in a "
        "process of its own, and projects the hours of the config's table. Images are "
        "synthetic: nothing is downloaded.",
        epilog=flags.ANY_FIELD,
    )
    add = parser.add_argument
    add("--config", **flags.CONFIG, default="configs/cifar10.py")
    workdir = {"default": "runs/bench", "help": "default: %(default)s"}
    add("--workdir", **flags.DIRECTORY, **workdir)
    kinds = flags.names_of("step", "epoch", "evaluation", "unrolled")
    unrolled = "step, epoch, evaluation, unrolled (AT's loop); default: the first three"
    add("--measure", **kinds, help=unrolled)
    methods = flags.names_of("st", "sam", "at", "at+sam")
    add("--methods", **methods, help="of st, sam, at, at+sam; default: st,sam,at")
    add("--batch-sizes", **flags.COUNTS, help="default: the config's")
    precisions = flags.names_of("float32", "bfloat16")
    choices = "of float32, bfloat16; default: the config's"
    add("--precisions", **precisions, help=choices)
    devices = "how many (virtual ones on a CPU); default: all"
    add("--devices", **flags.SIZES, help=devices)
    add("--steps-per-call", **flags.SIZES, help="default: as in training")
    xla = "added to XLA_FLAGS; repeat for variants to compare; '' adds none"
    add("--xla-flags", action="append", metavar="FLAGS", help=xla)
    compare = "interleave the same steps in PyTorch; needs torch"
    add("--compare", choices=("pytorch",), help=compare)
    variants = flags.names_of("reference", "resident", "tuned", "compiled")
    every = "of PyTorch: reference, resident, tuned, compiled; default: all"
    add("--variants", **variants, help=every)
    add("--repeats", **flags.FEW, help="of each process; default: 5")
    add("--rounds", **flags.FEW, help="processes per row; default: 2")
    add("--min-seconds", **flags.POSITIVE, help="of a repeat; default: 2")
    aot = "compile for a device that is not there, and count kernels and bytes"
    add("--aot", choices=("h200", "v5e"), help=aot)
    add("--row", **flags.ROWS, help="with --aot: of any method; repeat for several")
    profile = "write Perfetto traces, one per row, instead of measuring"
    add("--profile", action="store_true", help=profile)


def run(arguments: argparse.Namespace, should_stop: Callable[[], bool]) -> int:
    """Runs the bench of a command line; returns the exit code, 1 if a row failed.

    What is measured is written after every process, so that nothing is lost when the
    bench is stopped.
    """
    from samrobust.cli.shared import show_written
    from samrobust.experiments.reporting.console import make_console
    from samrobust.experiments.reporting.progress import ProgressDisplay
    from samrobust.studies.bench.plan import Options, plan
    from samrobust.studies.bench.report import to_sheet, write_report
    from samrobust.studies.bench.results import summarize
    from samrobust.studies.bench.suite import Launcher, schedule
    from samrobust.system.files import check_writable

    options = flags.build(Options, arguments)
    check(bool(options.aot) or not options.row, "--aot with --row", row=options.row)
    if options.aot:
        return _count(options, pathlib.Path(arguments.workdir), should_stop)
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
            return FAILED if failed else 0
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
    show_written(console, workdir, write_report(report, workdir))
    return FAILED if report.failures else 0


def _count(
    options: "Options", workdir: pathlib.Path, should_stop: Callable[[], bool]
) -> int:
    """Counts programs for a device that is not there; returns the exit code."""
    from samrobust.cli.shared import show_written
    from samrobust.experiments.reporting.console import make_console
    from samrobust.experiments.reporting.progress import ProgressDisplay
    from samrobust.studies.bench import aot
    from samrobust.studies.bench.suite import Launcher
    from samrobust.system.files import check_writable

    assert options.aot is not None
    aot.check_target(options.aot)
    tasks = aot.plan_counts(options)
    check_writable(workdir)
    console, outcomes = make_console(), {}
    display = ProgressDisplay(console, len(tasks))
    with tempfile.TemporaryDirectory(prefix="samrobust-bench-") as folder:
        launch = Launcher(options, pathlib.Path(folder), should_stop)
        with display.live():
            for number, task in enumerate(tasks):
                display.show(f"{task.row} {task.kind}", float(number))
                outcomes[task] = launch(task)
                aot.write_counts(outcomes, options.aot, workdir)
    console.print(aot.to_sheet(outcomes, options.aot).to_rich())
    paths = aot.write_counts(outcomes, options.aot, workdir)
    show_written(console, workdir, paths)
    return FAILED if any("error" in found for found in outcomes.values()) else 0
