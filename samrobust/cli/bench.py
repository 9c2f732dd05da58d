"""`samrobust bench`: plans, measures, shows and writes as it goes."""

import argparse
import collections
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from samrobust.cli import flags

if TYPE_CHECKING:
    from rich.console import Console

    from samrobust.studies.bench.plan import Options, Task
    from samrobust.studies.bench.process import Launcher
    from samrobust.studies.bench.results import Report

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
    profile = "write Perfetto traces, one per row, instead of measuring"
    add("--profile", action="store_true", help=profile)


def run(arguments: argparse.Namespace, should_stop: Callable[[], bool]) -> int:
    """Runs the bench of a command line; returns the exit code, 1 if a row failed.

    What is measured is written after every process, so that nothing is lost when the
    bench is stopped.
    """
    from samrobust.experiments.reporting.console import make_console
    from samrobust.experiments.reporting.progress import ProgressDisplay
    from samrobust.studies.bench.plan import Options, Task, plan
    from samrobust.studies.bench.process import check_pytorch
    from samrobust.studies.bench.report import to_rich, write_report
    from samrobust.studies.bench.results import summarise
    from samrobust.studies.bench.suite import run_suite
    from samrobust.system.files import check_writable

    options = flags.build(Options, arguments)
    tasks = plan(options)
    check_pytorch(options)
    check_writable(pathlib.Path(arguments.workdir))
    console, workdir = make_console(), pathlib.Path(arguments.workdir)
    if arguments.profile:
        return _profile(tasks, options, workdir, console, should_stop)
    outcomes: dict[Task, list[dict[str, Any]]] = collections.defaultdict(list)
    ceilings: dict[str, dict[str, Any]] = {}
    counts: dict[str, Any] = {}

    def report() -> "Report":
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
    tasks: "Sequence[Task]",
    options: "Options",
    workdir: pathlib.Path,
    console: "Console",
    should_stop: Callable[[], bool],
) -> int:
    """Writes a trace of every row of our own."""
    from samrobust.studies.bench.process import Launcher

    own = [task for task in tasks if task.kind != "pytorch"]
    with tempfile.TemporaryDirectory(prefix="samrobust-bench-") as cache:
        launch = Launcher(pathlib.Path(cache), should_stop)
        failed = [_trace(task, options, workdir, console, launch) for task in own]
    return 1 if any(failed) else 0


def _trace(
    task: "Task",
    options: "Options",
    workdir: pathlib.Path,
    console: "Console",
    launch: "Launcher",
) -> bool:
    """Writes the trace of a row; returns whether that failed."""
    from samrobust.studies.bench.plan import spec_of

    folder = workdir / "traces" / task.name.replace(", ", "-").replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    spec = spec_of(task, options) | {"trace": True, "path": str(folder)}
    error = launch.worker(spec, task).get("error")
    outcome = f"{task.name}: {error or folder}"
    console.print(outcome)
    return error is not None
