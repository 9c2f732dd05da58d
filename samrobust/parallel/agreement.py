"""What the processes of a run agree upon: values, stops, failures.

All processes run the same program in step. Process 0 alone reads and writes the files
of a run; what it finds there reaches the others through `from_primary`. A request to
stop becomes that of all at the same step (`AgreedStop`). A process that fails tells
the others why before it leaves (`leave`).

Small values go through the coordination service that the processes met at, so that
the others wait on the host, for as long as process 0 takes, and not inside a
collective operation. With a single process everything here is the plain call.
"""

import itertools
import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the store has no public name; Orbax does the same
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from samrobust.parallel.mesh import replicate
from samrobust.parallel.start import initialize
from samrobust.types import PyTree

__all__ = [
    "AgreedStop",
    "broadcast",
    "from_primary",
    "is_joined",
    "is_primary",
    "is_shared",
    "join",
    "leave",
    "lost_a_peer",
    "part",
    "request_stop",
]

T = TypeVar("T")

_FAILURE = "samrobust/failure"
_POLL_MILLISECONDS = 1000  # signals are handled in between
_GRACE_SECONDS = 2.0  # for a message to arrive, or to fail by oneself first
_numbers = itertools.count()


def is_primary() -> bool:
    """Whether this is process 0, the one that reads and writes the run's files."""
    return jax.process_index() == 0


def is_joined() -> bool:
    """Whether this process has joined others; asks JAX for no device."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def part() -> None:
    """The orderly end: waits until all processes are here. See `leave`."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def from_primary(function: Callable[[], T]) -> T:
    """Calls a function on process 0; all processes get what it returned or raised.

    All processes must call it, in the same order.

    Args:
      function: called on process 0 alone; returns what can be pickled, of at most
        a megabyte or so. For arrays see `broadcast`.

    Raises:
      Exception: whatever the function raised; of the same class in all processes.
    """
    if jax.process_count() == 1:
        return function()
    key = f"samrobust/value/{next(_numbers)}"
    if not is_primary():
        return _unpack(_wait_for(key))
    try:
        value = function()
    except Exception as error:
        _store().key_value_set_bytes(key, _pack(None, error))
        error._samrobust_is_shared = True  # type: ignore[attr-defined]
        raise
    _store().key_value_set_bytes(key, _pack(value, None))
    return value


def is_shared(error: BaseException) -> bool:
    """Whether all processes raise this error, from `from_primary`."""
    return getattr(error, "_samrobust_is_shared", False)


def broadcast(tree: PyTree, mesh: Mesh) -> PyTree:
    """Replicates the arrays of process 0 over the devices of all processes.

    Args:
      tree: arrays, of the same shapes and dtypes in all processes; the values of
        process 0 are taken.
      mesh: of all devices.

    Returns:
      The tree of global arrays. **Guarantees**: bit for bit those of process 0.
    """
    if jax.process_count() == 1:
        return replicate(tree, mesh)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    # As bytes: JAX broadcasts by a sum, which would turn -0.0 into 0.0.
    flat = [np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in leaves]
    sent = multihost_utils.broadcast_one_to_all(np.concatenate([*flat, _NOTHING]))
    parts = np.split(np.asarray(sent), np.cumsum([part.size for part in flat]))
    received = [
        part.view(leaf.dtype).reshape(leaf.shape)
        for part, leaf in zip(parts, leaves, strict=False)
    ]
    return replicate(jax.tree.unflatten(jax.tree.structure(tree), received), mesh)


_NOTHING = np.zeros(0, np.uint8)


class AgreedStop:
    """Turns a request to stop any process into one that all hear at the same call.

    All processes must ask equally often. A SIGTERM to any of them reaches JAX's
    preemption service, which lets them all stop at a call that none has made yet.

    Args:
      local: whether this process was asked to stop, by Ctrl-C or before it joined.
    """

    def __init__(self, local: Callable[[], bool]):
        self._local, self._passed_on = local, False
        self._calls, self._agreed = 0, False

    def __call__(self) -> bool:
        """Whether to stop; the same answer in all processes."""
        if jax.process_count() == 1:
            return self._local()
        if self._local() and not self._passed_on:
            self._passed_on = True
            request_stop()
        self._calls += 1  # by one each time: the service hears no other stride
        reached = multihost_utils.reached_preemption_sync_point(self._calls)
        self._agreed = self._agreed or reached
        return self._agreed


def request_stop() -> None:
    """Asks all processes of the run to stop; they do at the next call they agree on."""
    os.kill(os.getpid(), signal.SIGTERM)  # JAX's preemption service listens to it


def join(stop: Callable[[], bool]) -> AgreedStop:
    """Joins the other processes of the run, if there are any; see `initialize`.

    From then on this process ends soon after another one has said that it failed,
    instead of waiting for it until the heartbeat's timeout.

    Args:
      stop: whether this process was asked to stop.

    Returns:
      The same question, answered alike in all processes.
    """
    initialize()
    if jax.process_count() > 1:
        threading.Thread(target=_watch, daemon=True).start()
    return AgreedStop(stop)


def leave(code: int, reason: str) -> NoReturn:
    """Ends this process at once because it failed, and tells the others why.

    The orderly end would wait for processes that wait for this one.

    Args:
      code: exit code, of the others too.
      reason: one line.
    """
    failure = {"process": jax.process_index(), "code": code, "reason": reason}
    try:
        _store().key_value_set(_FAILURE, json.dumps(failure))
    except Exception:  # told by another process before, or the service is gone
        pass
    else:
        if is_primary():  # the service ends with this process: let the others read
            time.sleep(_GRACE_SECONDS)
    _exit(code)


def lost_a_peer(error: BaseException) -> bool:
    """Whether an error of the runtime says that another process is gone."""
    signs = ("Gloo", "NCCL", "Connection closed", "Connection reset", "heartbeat")
    several = jax.process_count() > 1
    return several and any(sign in str(error) for sign in signs)


def _watch() -> None:
    try:
        failure = json.loads(_wait_for(_FAILURE))
    except Exception:  # the service is gone: JAX ends this process, or it is ending
        return
    if failure["process"] == jax.process_index():
        return
    time.sleep(_GRACE_SECONDS / 2)
    print(
        f"samrobust: process {failure['process']} failed: {failure['reason']} "
        f"Process {jax.process_index()} stops too.",
        file=sys.stderr,
    )
    _exit(failure["code"])


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait_for(key: str) -> bytes:
    """The value of a key, as soon as another process has set it."""
    while True:
        try:
            return _store().blocking_key_value_get_bytes(key, _POLL_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _pack(value: Any, error: Exception | None) -> bytes:
    try:
        packed = pickle.dumps((value, error))
        pickle.loads(packed)
    except Exception:  # an exception that cannot be made again from its arguments
        if error is None:
            raise
        return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
    return packed


def _unpack(packed: bytes) -> Any:
    value, error = pickle.loads(packed)
    if error is not None:
        error._samrobust_is_shared = True
        raise error
    return value


def _store() -> Any:
    return distributed.global_state.client
