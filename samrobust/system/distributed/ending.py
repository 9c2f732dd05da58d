"""The end of a run's processes: together, or after one of them failed alone."""

import contextlib
import json
import os
import sys
import threading
import time
import warnings
from typing import NoReturn

import jax

from samrobust.system.jax_internals import is_joined, look_for, process_number, store
from samrobust.system.runtime import say

__all__ = ["abort", "lost_a_peer", "shut_down", "watch_for_failures"]

_FAILURE = "samrobust/failure"
_WATCH_SECONDS = 0.5  # between two looks for a failure
_OWN_SECONDS = 1.0  # for a process that hears of a failure to fail by itself first
# Process 0 keeps the store for twice as long as the slowest of the others needs: JAX
# aborts a process that finds it gone.
_GRACE_SECONDS = 2 * (_WATCH_SECONDS + _OWN_SECONDS)


def watch_for_failures() -> None:
    """Ends this process soon after another one reports a failure.

    Otherwise it would wait for that one until the heartbeat's timeout.
    """
    if is_joined():
        _watcher.start()


def shut_down() -> None:
    """Waits until all processes are here: the orderly end. See `abort`."""
    _left.set()
    if _watcher.is_alive():  # it would hang in a call of a store that is gone
        _watcher.join()
    if jax.distributed.is_initialized():
        try:
            jax.distributed.shutdown()
        except RuntimeError as error:  # the work is done, whatever became of the others
            warnings.warn(f"The processes did not part in order: {error}", stacklevel=2)


def abort(code: int, reason: str) -> NoReturn:
    """Ends this process at once because it failed alone, and tells the others why.

    The orderly end would wait for processes that wait for this one.

    Args:
      code: exit code, of the others too.
      reason: in a few words.
    """
    failure = {"process": process_number(), "code": code, "reason": reason}
    with contextlib.suppress(Exception):  # another told before, or the store is gone
        store().key_value_set(_FAILURE, json.dumps(failure))
    if process_number() == 0:  # the store ends with this process: let the others read
        time.sleep(_GRACE_SECONDS)
    _exit(code)


def lost_a_peer(error: BaseException) -> bool:
    """Tells whether an error of the runtime says that another process is gone."""
    signs = ("Gloo", "NCCL", "Connection closed", "Connection reset", "heartbeat")
    return is_joined() and any(sign in str(error) for sign in signs)


def _watch() -> None:
    """Looks now and then whether another process has failed, until this one leaves."""
    while not _left.wait(_WATCH_SECONDS):
        try:
            told = look_for(_FAILURE)
        except jax.errors.JaxRuntimeError:  # the store is gone, and with it process 0:
            return  # JAX ends this process too
        failure = {} if told is None else json.loads(told)
        if failure.get("process") in (None, process_number()):
            continue
        if not _left.wait(_OWN_SECONDS):
            say(
                f"process {failure['process']} failed: {failure['reason']} "
                f"Process {process_number()} stops too."
            )
            _exit(failure["code"])


_left = threading.Event()
_watcher = threading.Thread(target=_watch, daemon=True)


def _exit(code: int) -> NoReturn:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
