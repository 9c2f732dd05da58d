"""Agreement among the processes of a run: on values, arrays, stops.

All processes run the same program in step. Only process 0 reads and writes the files of
a run; `broadcast_from_primary` and `broadcast` give the others what it finds. Small
values go through the coordination service that the processes met at, so that a process
waits for another on the host, and not inside a collective operation. A request to stop
one process stops all at the same step (`AgreedStop`). With a single process everything
here is a plain call.
"""

import collections
import os
import pickle
import signal
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from samrobust.system.distributed.ending import lost_a_peer
from samrobust.system.distributed.mesh import replicate
from samrobust.system.distributed.start import initialize
from samrobust.system.failures import is_transient
from samrobust.system.jax_internals import is_joined, look_for, store
from samrobust.types import PyTree

__all__ = [
    "AgreedStop",
    "broadcast",
    "broadcast_from_primary",
    "is_primary",
    "is_shared",
    "join",
    "met_by_all",
]

T = TypeVar("T")

_BARRIER_MILLISECONDS = 10_000
_LONGEST_PAUSE = 0.2  # seconds between two looks for a value
_calls: collections.Counter[str] = collections.Counter()  # the same in all processes


def is_primary() -> bool:
    """Tells whether this is process 0, which reads and writes the run's files."""
    return jax.process_index() == 0


def broadcast_from_primary(function: Callable[[], T]) -> T:
    """Calls a function on process 0 and broadcasts what it returned or raised.

    All processes must call it, in the same order.

    Args:
      function: called on process 0 alone; returns what can be pickled, of at most
        a megabyte or so. For arrays see `broadcast`.

    Raises:
      Exception: whatever the function raised; of the same class in all processes, or a
        RuntimeError in the others if it cannot be pickled.
    """
    if not is_joined():
        return function()
    _calls["broadcast"] += 1
    key = f"samrobust/value/{_calls['broadcast']}"
    if not is_primary():
        return _unpack(_wait_for(key))
    try:
        value = function()
    except Exception as error:
        store().key_value_set_bytes(key, _pack(None, error))
        error._samrobust_is_shared = True  # type: ignore[attr-defined]
        raise
    store().key_value_set_bytes(key, _pack(value, None))
    return value


def _wait_for(key: str) -> bytes:
    """Returns the value of a key, as soon as another process has set it."""
    pause = 0.001
    while (value := look_for(key)) is None:
        time.sleep(pause)  # signals are handled meanwhile
        pause = min(2 * pause, _LONGEST_PAUSE)
    return value


def is_shared(error: BaseException) -> bool:
    """Tells whether all processes raise this error, from `broadcast_from_primary`."""
    return getattr(error, "_samrobust_is_shared", False)


def met_by_all(error: Exception) -> bool:
    """Tells whether all processes met an error at the same place, so are still in step.

    All processes that met one must call this. It may take ten seconds to return False.
    A broken connection to another process never counts: what follows would meet it too.
    """
    if lost_a_peer(error):
        return False
    if not is_joined() or is_shared(error):
        return True
    try:
        name = f"samrobust/met/{_calls['broadcast']}"
        store().wait_at_barrier(name, _BARRIER_MILLISECONDS)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def broadcast(tree: PyTree, mesh: Mesh) -> PyTree:
    """Replicates the arrays of process 0 over the devices of all processes.

    Args:
      tree: arrays, of the same shapes and dtypes in all processes; the values of
        process 0 are taken.
      mesh: of all devices.

    Returns:
      The tree of global arrays. **Guarantees**: bit for bit those of process 0.
    """
    if not is_joined():
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
    """A request to stop any process, which all of them see at the same call.

    All processes must call it equally often, and each must have only one. A SIGTERM to
    any of them reaches JAX's preemption service, which makes them all stop at a call
    that none has made yet.

    Args:
      local: whether this process was asked to stop, by Ctrl-C or before it joined.
    """

    def __init__(self, local: Callable[[], bool]):
        self._local, self._passed_on = local, False
        self._calls, self._agreed = 0, False

    def __call__(self) -> bool:
        """Tells whether to stop; the same answer in all processes."""
        if not jax.distributed.is_initialized():  # else SIGTERM is JAX's
            return self._local()
        if self._local() and not self._passed_on:
            self._passed_on = True
            os.kill(os.getpid(), signal.SIGTERM)  # the service listens to it
        self._calls += 1  # by one each time: the service hears no other stride
        reached = multihost_utils.reached_preemption_sync_point(self._calls)
        self._agreed = self._agreed or reached
        return self._agreed


def join(stop: Callable[[], bool]) -> AgreedStop:
    """Joins the other processes of the run, if there are any; see `initialize`.

    Args:
      stop: whether this process was asked to stop.

    Returns:
      The same question, with the same answer in all processes.
    """
    initialize()
    return AgreedStop(stop)


def _pack(value: Any, error: Exception | None) -> bytes:
    if is_transient(error):  # its cause stays here
        error.samrobust_is_transient = True  # type: ignore[union-attr]
    try:
        packed = pickle.dumps((value, error))
        pickle.loads(packed)
    except Exception:  # an exception that cannot be made again from its arguments
        if error is None:
            raise
        stand_in: Any = RuntimeError(f"{type(error).__name__}: {error}")
        stand_in.samrobust_is_transient = is_transient(error)
        return pickle.dumps((None, stand_in))
    return packed


def _unpack(packed: bytes) -> Any:
    value, error = pickle.loads(packed)
    if error is not None:
        error._samrobust_is_shared = True
        raise error
    return value
