"""How a command runs: signals, exit codes, and errors that the user can fix."""

import argparse
import logging
import signal
import traceback
import warnings
from collections.abc import Callable
from typing import TypeAlias

import jax

from samrobust.data import DatasetUnavailableError
from samrobust.system import distributed, runtime
from samrobust.system.claims.lease import ClaimedError, lease_seconds
from samrobust.system.failures import is_transient
from samrobust.system.files import WorkdirError
from samrobust.training import InterruptedRunError, TrainingDivergedError
from samrobust.training.checkpoint import CheckpointError

__all__ = ["execute"]

_CTRL_C = runtime.EXIT_CODES[signal.SIGINT]

# Commands that a signal may end in the middle of a computation, and after how long:
# their findings are stored as they come, or computed again by a rerun.
_LOSES_NOTHING = ("evaluate", "recheck", "curves", "sharpness", "theory")
_PATIENCE = 1.5  # seconds
_ALONE = ("theory", "export", "import")  # the others look for a device as they join


Run: TypeAlias = Callable[[argparse.Namespace, runtime.StopRequest], int]


def execute(run: Run, arguments: argparse.Namespace) -> int:
    """Runs a subcommand; turns errors that the user can fix into a line and a code."""
    warnings.formatwarning = lambda message, *_: (
        f"samrobust: warning: {runtime.one_line(str(message))}\n"
    )
    patience = _PATIENCE if arguments.command in _LOSES_NOTHING else None
    stop = runtime.StopRequest(patience, is_alone=lambda: not distributed.is_joined())
    with stop.listening():
        code = _run(run, arguments, stop)
        distributed.shut_down()
    return code


def _run(run: Run, arguments: argparse.Namespace, stop: runtime.StopRequest) -> int:
    """Returns a command's exit code; exits at once if this process failed alone."""
    try:
        lease_seconds()  # checked here, or each row of a table would fail by it
        jax.config.update("jax_enable_x64", False)  # a seed would draw other numbers
        runtime.enable_compilation_cache()
        runtime.keep_freed_memory()
        logging.getLogger("absl").addFilter(_is_news)
        if arguments.command in _ALONE:
            distributed.check_platform()
        return run(arguments, stop)
    except InterruptedRunError as error:
        _say(str(error), error)
        return runtime.EXIT_CODES[stop.signal or signal.SIGTERM]
    except KeyboardInterrupt:
        if distributed.is_joined():
            distributed.abort(_CTRL_C, "It was interrupted by Ctrl-C.")
        return _CTRL_C
    except (BrokenPipeError, runtime.OutputError):
        if distributed.is_joined():
            distributed.abort(runtime.FAILED, "Its output cannot be written.")
        raise
    except Exception as error:
        code = _code_of(error)
        if code is None:
            if not distributed.is_joined():
                raise
            traceback.print_exc()
            code = runtime.FAILED
        message = str(error) or type(error).__name__
        message = f"{_LOST} ({message})" if distributed.lost_a_peer(error) else message
        _say(f"error: {message}", error)
        if distributed.is_joined() and not distributed.is_shared(error):
            distributed.abort(code, message)
        return code


_LOST = (
    "Another process of this run died. Rerun the same command in all of them to resume "
    "from the last checkpoint."
)


def _code_of(error: Exception) -> int | None:
    """Returns the exit code of an error that the user can fix; None for any other."""
    elsewhere = isinstance(error, ClaimedError | distributed.DistributedError)
    if elsewhere or distributed.lost_a_peer(error) or is_transient(error):
        return runtime.TRANSIENT
    if isinstance(error, WorkdirError | DatasetUnavailableError):
        return runtime.BAD_INPUT
    if isinstance(error, TrainingDivergedError | CheckpointError):
        return runtime.FAILED
    if isinstance(error, ValueError):
        return runtime.BAD_INPUT
    out_of_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    return runtime.FAILED if isinstance(error, OSError) or out_of_memory else None


def _is_news(record: logging.LogRecord) -> bool:
    """Leaves out of the log what is said once by `CheckpointError`, or is no news.

    Orbax logs the traceback of a failed write up to five times. That a save waits for
    the one before tells of a busy disk alone.
    """
    return "orbax" not in record.pathname or (
        record.levelno != logging.ERROR and "previous save" not in str(record.msg)
    )


def _say(text: str, error: BaseException) -> None:
    """Says something once, where all processes have the same to say."""
    if not distributed.is_joined() or distributed.process_number() == 0:
        runtime.say(text)
    elif not (distributed.is_shared(error) or isinstance(error, InterruptedRunError)):
        runtime.say(f"(process {distributed.process_number()}) {text}")
