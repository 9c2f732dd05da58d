"""What the subcommands do: read, run, show. See `samrobust.cli` for their flags."""

import argparse
import pathlib
import signal
import traceback
import warnings
from collections.abc import Callable, Sequence

import jax
from rich.console import Console

from samrobust.cli.bench import bench_command
from samrobust.cli.curves import curves_command
from samrobust.cli.evaluate import evaluate_command, print_accuracies
from samrobust.cli.interchange import export_command, import_command
from samrobust.cli.recheck import recheck_command
from samrobust.cli.table import table_command
from samrobust.cli.theory import theory_command
from samrobust.data import DatasetUnavailableError
from samrobust.experiments import building, configuration
from samrobust.experiments.reporting.console import make_console
from samrobust.experiments.reporting.progress import ProgressDisplay
from samrobust.experiments.run import PlannedRun, run, work
from samrobust.experiments.tracking import check_installed
from samrobust.studies.bench.suite import StoppedError
from samrobust.system import distributed
from samrobust.system.claims import await_verdict, lease_seconds
from samrobust.system.files import WorkdirError
from samrobust.system.runtime import (
    EXIT_CODES,
    OutputError,
    StopRequest,
    enable_compilation_cache,
    keep_freed_memory,
    one_line,
    say,
)
from samrobust.training import InterruptedRunError, TrainingDivergedError
from samrobust.training.checkpoint import CheckpointError

__all__ = ["execute"]

_FAILED, _BAD_INPUT, _LOST_PEER, _CTRL_C = 1, 2, 69, EXIT_CODES[signal.SIGINT]


def execute(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Runs a subcommand; turns the errors a user can mend into a line and a code."""
    warnings.formatwarning = lambda message, *_: (
        f"samrobust: warning: {one_line(str(message))}\n"
    )
    command = {
        "table": table_command,
        "train": _train,
        "evaluate": evaluate_command,
        "recheck": recheck_command,
        "curves": curves_command,
        "bench": bench_command,
        "theory": theory_command,
        "export": export_command,
        "import": import_command,
    }[arguments.command]
    patience = _PATIENCE if arguments.command in _LOSES_NOTHING else None
    stop = StopRequest(patience, is_alone=lambda: not distributed.is_joined())

    def work() -> int:
        lease_seconds()  # a row of a table would fail by it, and then the next
        jax.config.update("jax_enable_x64", False)  # or a seed draws other numbers
        enable_compilation_cache()
        keep_freed_memory()
        if arguments.command in _ALONE:
            distributed.check_platform()
        return command(arguments, overrides, stop)

    with stop.listening():
        code = _run(work, stop)
        distributed.part()
    return code


# Commands that a signal may end in the midst of a computation, and after how long:
# what they have found is stored as they go, or found again.
_LOSES_NOTHING, _PATIENCE = ("evaluate", "recheck", "curves", "theory"), 1.5  # seconds
_ALONE = ("theory", "export", "import")  # the others ask as they join, or not at all


def _run(command: Callable[[], int], stop: StopRequest) -> int:
    """The exit code of a command; ends the process itself if it failed alone."""
    try:
        return command()
    except (InterruptedRunError, StoppedError) as error:
        _say(str(error), error)
        return EXIT_CODES[stop.signal or signal.SIGTERM]
    except KeyboardInterrupt:
        if distributed.is_joined():
            distributed.leave(_CTRL_C, "It was interrupted by Ctrl-C.")
        return _CTRL_C
    except (BrokenPipeError, OutputError):
        if distributed.is_joined():
            distributed.leave(_FAILED, "What it shows cannot be written.")
        raise
    except Exception as error:
        code = _code_of(error)
        if code is None:
            if not distributed.is_joined():
                raise
            traceback.print_exc()
            code = _FAILED
        message = str(error) or type(error).__name__
        message = f"{_LOST} ({message})" if code == _LOST_PEER else message
        _say(f"error: {message}", error)
        if distributed.is_joined() and not distributed.is_shared(error):
            distributed.leave(code, message)
        return code


_LOST = (
    "Another process of this run is gone. Start all of them again with the same "
    "command: the run goes on from its last checkpoint."
)


def _code_of(error: Exception) -> int | None:
    """The exit code of an error that the user can mend; None for any other."""
    if isinstance(error, WorkdirError | DatasetUnavailableError):
        return _BAD_INPUT
    if isinstance(
        error, TrainingDivergedError | CheckpointError | distributed.DistributedError
    ):
        return _FAILED
    if distributed.lost_a_peer(error):
        return _LOST_PEER
    if isinstance(error, ValueError):
        return _BAD_INPUT
    out_of_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    return _FAILED if isinstance(error, OSError) or out_of_memory else None


def _say(text: str, error: BaseException) -> None:
    """Says it once, where all processes have the same to say."""
    if not distributed.is_joined() or distributed.is_primary():
        say(text)
    elif not (distributed.is_shared(error) or isinstance(error, InterruptedRunError)):
        say(f"(process {jax.process_index()}) {text}")


def _console() -> Console:
    """Process 0 alone shows things."""
    return make_console(quiet=not distributed.is_primary())


def _train(
    arguments: argparse.Namespace, overrides: Sequence[str], stop: StopRequest
) -> int:
    config = configuration.load_config(arguments.config, overrides)
    check_installed(config)
    should_stop, console = distributed.join(stop), _console()
    planned = PlannedRun(config, pathlib.Path(arguments.workdir))
    await_verdict(
        planned.workdir,
        should_stop=should_stop,
        on_wait=console.print,
        agree=distributed.from_primary,
    )
    if should_stop():
        message = "Stopped as it waited for another process. The same command goes on."
        raise InterruptedRunError(message)
    dataset = building.load_data(config)
    works = work(config, dataset)
    display = ProgressDisplay(console, sum(works))
    with display.live():
        observer = display.run(planned.name, *works)
        result = run(
            config, planned.workdir, observer, dataset=dataset, should_stop=should_stop
        )
    print_accuracies(console, planned.name, result["accuracy"])
    console.print(f"Written to {planned.workdir}: result.json")
    return 0
