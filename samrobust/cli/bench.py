"""`samrobust bench`: plans, measures, shows and writes as it goes."""

import argparse
import dataclasses
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from samrobust.checks import check
from samrobust.cli import flags
from samrobust.studies.bench.twin.variants import VARIANTS
from samrobust.system.runtime import FAILED

if TYPE_CHECKING:
    from samrobust.studies.bench.plan import Task
    from samrobust.studies.bench.suite import Outcome

__all__ = ["ABOUT", "add_flags", "check_read", "run"]

_ALWAYS = ("command", "config", "overrides", "workdir")
_ROWS = (
    *("measure", "methods", "row", "batch_sizes", "precisions", "devices"),
    *("steps_per_call", "xla_flags", "seeds_per_program"),
)
_TIMES = (*_ROWS, "repeats", "rounds", "min_seconds", "cache")
# What a bench reads, by the flag that says of which kind it is.
_READ = {
    "": (*_TIMES, "ceilings", "no_rates"),
    "compare": (*_TIMES, "ceilings", "no_rates", "compare", "variants"),
    "profile": (*_ROWS, "cache", "profile"),
    "aot": (*_ROWS, "aot"),
}


ABOUT = {
    "help": "how fast training is, next to its FLOPs, the paper and PyTorch",
    "description": "Times training steps, as epochs run them, and evaluations, each "
    "row in a process of its own. Images are synthetic: nothing is downloaded. "
    "`samrobust estimate` says how long a table takes.",
    "epilog": flags.ANY_FIELD,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--config", **flags.CONFIG, default="configs/cifar10.py")
    add("--workdir", **flags.FOLDER, default="runs/bench")
    kinds = flags.names_of("step", "evaluation", "unrolled")
    unrolled = "step, evaluation, unrolled (AT's loop); default: the first two"
    add("--measure", **kinds, help=unrolled)
    methods = flags.names_of("st", "sam", "at", "at+sam")
    trained = parser.add_mutually_exclusive_group().add_argument
    first = "of st, sam, at, at+sam; default: st,sam,at"
    trained("--methods", **methods, help=first)
    instead = "of any method, instead of --methods; repeatable"
    trained("--row", **flags.ROWS, help=instead)
    add("--batch-sizes", **flags.COUNTS, help="default: the config's")
    precisions = flags.names_of("float32", "bfloat16")
    choices = "of float32, bfloat16; default: the config's"
    add("--precisions", **precisions, help=choices)
    devices = "how many (virtual ones on a CPU); default: all, with --aot one"
    add("--devices", **flags.SIZES, help=devices)
    add("--steps-per-call", **flags.SIZES, help="default: as in training")
    xla = "options of XLA for what is measured; repeat to compare; '' for none"
    add("--xla-flags", action="append", metavar="FLAGS", help=xla)
    several = "runs whose steps one program takes, see table; default: 1"
    add("--seeds-per-program", **flags.COUNTS, help=several)
    compare = "interleave the same steps in PyTorch; needs torch"
    add("--compare", choices=("pytorch",), help=compare)
    every = f"of PyTorch: {', '.join(VARIANTS)}; default: the first three and compiled"
    add("--variants", **flags.names_of(*VARIANTS), help=every)
    add("--repeats", **flags.FEW, help="of each process; default: 5")
    add("--rounds", **flags.FEW, help="processes per row; default: 2")
    cache = "of compiled programs, kept; default: an empty one, removed afterwards"
    add("--cache", **flags.DIRECTORY, help=cache)
    before = "rooflines of this device, measured before: a campaign's machine.json"
    add("--ceilings", **flags.FILE, help=before)
    rates = "leave out the roofline and the counts of operations"
    add("--no-rates", **flags.SWITCH, help=rates)
    add("--min-seconds", **flags.POSITIVE, help="of a repeat; default: 2")
    aot = "compile for a device that is not there, and count kernels and bytes"
    add("--aot", choices=("h200", "v5e"), help=aot)
    profile = "write Perfetto traces, one per row, instead of measuring"
    add("--profile", **flags.SWITCH, help=profile)


def check_read(arguments: argparse.Namespace) -> None:
    """Refuses flags that the bench would not read; one missing from `_READ` is unread.

    Raises:
      ValueError: names them.
    """
    rates = {"--ceilings": arguments.ceilings, "--no-rates": arguments.no_rates}
    check(None in rates.values(), "one of --ceilings and --no-rates", **rates)
    how = next((n for n in ("aot", "profile", "compare") if getattr(arguments, n)), "")
    unread = vars(arguments).keys() - {*_ALWAYS, *_READ[how]}
    given = flags.given(vars(arguments), sorted(unread))
    named = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
    with_it = f"with --{how}" if how else "without --compare"
    check(
        not named,
        f"no {', '.join(named)} {with_it}",
        "Leave out what is not read.",
        **named,
    )


def run(arguments: argparse.Namespace, should_stop: Callable[[], bool]) -> int:
    """Runs the bench of a command line; returns the exit code, 1 if a row failed.

    What is measured is written after every process, so that nothing is lost when the
    bench is stopped. A rerun begins again, and its first row replaces what was written.
    """
    from samrobust.cli.shared import show_written
    from samrobust.experiments.reporting.console import make_console
    from samrobust.experiments.reporting.progress import ProgressDisplay
    from samrobust.studies.bench import aot
    from samrobust.studies.bench.plan import Options, plan
    from samrobust.studies.bench.report import to_sheet, write_report
    from samrobust.studies.bench.results import summarize
    from samrobust.studies.bench.suite import Launcher, schedule
    from samrobust.system.files import check_writable

    check_read(arguments)
    options = flags.build(Options, arguments)
    target, workdir = options.aot, pathlib.Path(arguments.workdir)
    if target:
        aot.check_target(target)
    tasks = plan(options)
    console, outcomes = make_console(), {}

    def write(*, is_done: bool = False) -> tuple[pathlib.Path, ...]:
        if target:
            return aot.write_counts(outcomes, target, workdir)
        report = summarize(outcomes, options)
        return write_report(report, workdir) if report.rows or is_done else ()

    with tempfile.TemporaryDirectory(prefix="samrobust-bench-") as folder:
        launch = Launcher(options, pathlib.Path(folder), should_stop)
        launch.check_flags(tasks[0])
        if not launch.takes_ceilings(tasks[0]):
            about = "is not known to be of this device: ceilings are measured again."
            warnings.warn(f"{options.ceilings} {about}", stacklevel=2)
            options = dataclasses.replace(options, ceilings=None)
        check_writable(workdir)
        if arguments.profile:
            for task in tasks:
                name = task.name.replace(", ", "-").replace(" ", "_")
                traces = workdir / "traces" / name
                traces.mkdir(parents=True, exist_ok=True)
                outcomes[task] = [launch(task, traces)]
                console.print(f"{task.name}: {outcomes[task][0].get('error', traces)}")
            return _exit_code(outcomes)
        order = schedule(tasks, options)
        display = ProgressDisplay(console, len(order))
        with display.live():
            for number, (name, task) in enumerate(order):
                display.show(name, float(number))
                outcomes.setdefault(task, []).append(launch(task))
                write()
    counts = target and aot.to_sheet(outcomes, target)
    sheet = counts or to_sheet(summarize(outcomes, options))
    console.print(sheet.to_rich())
    show_written(console, workdir, write(is_done=True))
    return _exit_code(outcomes)


def _exit_code(outcomes: "Mapping[Task, Sequence[Outcome]]") -> int:
    failed = any("error" in one for each in outcomes.values() for one in each)
    return FAILED if failed else 0
