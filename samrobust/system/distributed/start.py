"""The meeting of a run's processes."""

import collections
import contextlib
import functools
import os
import signal
import socket
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from samrobust.checks import check
from samrobust.system.distributed import environment
from samrobust.system.distributed.ending import watch_for_failures
from samrobust.system.jax_internals import has_backend, is_joined
from samrobust.system.runtime import answered, say

__all__ = ["DistributedError", "check_platform", "initialize"]


class DistributedError(RuntimeError):
    """The processes of a run did not find each other."""


def initialize() -> None:
    """Joins the other processes of the run; does nothing where there are none.

    Call it once the arguments are checked and before anything asks JAX for a device.
    A second call does nothing. `SAMROBUST_HEARTBEAT_SECONDS` (default 100) is how long
    a process may be silent before the others consider it dead,
    `SAMROBUST_MEETING_SECONDS` (default 600) how long they wait for each other here;
    JAX then ends the process, after our message about what to check. Once joined, this
    process ends soon after another one reports a failure. All variables are told by
    `samrobust.system.distributed.environment`.

    Raises:
      ValueError: if the variables contradict each other, JAX has computed something
        before, or the processes have different numbers of devices.
      DistributedError: if the others cannot be reached, as far as JAX says so.
    """
    if jax.distributed.is_initialized():
        return
    heartbeat = environment.read_seconds("SAMROBUST_HEARTBEAT_SECONDS", "100")
    meeting = environment.read_seconds("SAMROBUST_MEETING_SECONDS", "600")
    settings = environment.find_settings()
    join = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=meeting,
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=_LATE,
    )
    at = f" at {settings.address}" if settings else ""
    try:
        with _impatience(at, meeting), _mortality():
            if settings is not None:
                # Two programs at once could take each other's messages: gloo, which
                # connects CPUs, tells them apart by their order alone.
                jax.config.update("jax_cpu_enable_async_dispatch", False)
                _check_port(settings)
                _check_nothing_computed()
                join(*settings, cluster_detection_method="deactivate")
            elif environment.on_cloud_tpu():
                _check_nothing_computed()
                join()
    except (RuntimeError, OSError) as error:
        message = f"Expected to meet the other processes of the run{at}, got: {error} "
        raise DistributedError(message + _REMEDY) from error
    watch_for_failures()  # a process may find no device, and the others wait for it
    check_platform()
    if jax.distributed.is_initialized():
        _connect_devices()


def check_platform() -> None:
    """Refuses a JAX without a device, or without the one that was asked for.

    With `JAX_PLATFORMS=cuda,cpu` JAX passes over a machine without a driver in silence,
    and takes its CPU.

    Raises:
      ValueError: with JAX's reason, before any work.
      DistributedError: if another process did not name its devices in time.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    wanted = platforms.partition(",")[0]
    try:
        found, problem = jax.default_backend(), ""
    except (RuntimeError, AssertionError) as error:  # JAX's own, without a message
        if is_joined() and "topologies" in str(error):
            message = f"Expected the devices of all processes, got: {error} {_REMEDY}"
            raise DistributedError(message) from error
        found, problem = "", f"{error} "
    check(
        found not in ("", "cpu") or (found == "cpu" and wanted in ("", "cpu")),
        "a device that JAX can use",
        f"{problem}Set JAX_PLATFORMS=cpu, or install its driver, and JAX for it.",
        JAX_PLATFORMS=platforms or None,
    )


_LATE = 300  # seconds that one process may take longer than another to its end
_REMEDY = (
    "Check that all of them were started, with the same address and number, and that "
    "the port is free there and nothing blocks it."
)


def _connect_devices() -> None:
    """Connects all devices once, while all processes are at the same place.

    Later one may compile for minutes, and the others would time out.
    """
    counts = collections.Counter(device.process_index for device in jax.devices())
    check(
        len(set(counts.values())) == 1,
        "as many devices in every process",
        "Start each process with its share of them (JAX_LOCAL_DEVICE_IDS).",
        devices=[counts[index] for index in sorted(counts)],
    )
    multihost_utils.sync_global_devices("samrobust")


def _check_port(settings: environment.Settings) -> None:
    """Refuses, in process 0, a port in use: JAX would end without a message."""
    if settings.process_id == 0:
        port = int(settings.address.rpartition(":")[2])
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))


def _check_nothing_computed() -> None:
    """Refuses a JAX that has its devices already: those of others cannot join them."""
    computed = has_backend()
    check(
        not computed,
        "processes that meet before JAX computes anything",
        "Own code must not compute with JAX while it is imported: build its arrays "
        "inside the functions that use them, or with NumPy.",
        computed=computed,
    )


@contextlib.contextmanager
def _impatience(at: str, limit: int) -> Iterator[None]:
    """Says what a process waits for, well before JAX gives up and ends it."""
    words = f"Still waiting for the other processes{at}, {limit} s at most. {_REMEDY}"
    timer = threading.Timer(min(30, limit / 2), lambda: say(words))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _mortality() -> Iterator[None]:
    """Lets signals end a process that waits inside JAX, where no handler would run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in answered()}
    try:
        yield
    finally:
        if jax.distributed.is_initialized():
            del before[signal.SIGTERM]  # it is JAX's, see `AgreedStop`
        for number, handler in before.items():
            signal.signal(number, handler)
