"""Whether this process is one of several, which one, and how they find each other.

Several processes, one a machine or one a device, each run the same command; together
they are one run. Which environment they were started in is read from its variables:

- `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`: by hand, by
  Kubernetes, by `launch/local.py`; they win over all else.
- a SLURM step of several tasks, inside `srun`.
- a Cloud TPU: JAX finds the other workers of the slice.

Anything else, or `SAMROBUST_DISTRIBUTED=off`, is a single process.
"""

import contextlib
import functools
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils

from samrobust.checks import check

__all__ = ["DistributedError", "Settings", "find_settings", "initialize"]

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")


class DistributedError(RuntimeError):
    """The processes of a run did not find each other, or lost one another."""


class Settings(NamedTuple):
    """What a process must know to join the others.

    Attributes:
      address: `HOST:PORT` of process 0, which the others can reach.
      num_processes: of the run, > 1.
      process_id: of this one, 0 .. num_processes - 1.
      local_device_ids: the accelerators of this machine that are this process's; None
        for all of them.
    """

    address: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None


def initialize(environ: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of the run; does nothing where there are none.

    Call it once the arguments are checked and before anything asks JAX for a device.
    A second call does nothing. `SAMROBUST_HEARTBEAT_SECONDS` (default 100) is how long
    a process may be silent before the others give it up for dead,
    `SAMROBUST_MEETING_SECONDS` (default 600) how long they wait for each other here;
    JAX then ends the process, after words of ours about what to check.

    Args:
      environ: the environment variables, see the module.

    Raises:
      ValueError: if the variables contradict each other.
      DistributedError: if the others cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    heartbeat = _seconds(environ, "SAMROBUST_HEARTBEAT_SECONDS", "100")
    meeting = _seconds(environ, "SAMROBUST_MEETING_SECONDS", "600")
    settings = find_settings(environ)
    if settings is not None:
        # Two programs at once could take each other's messages: gloo, which connects
        # CPUs, tells them apart by their order alone.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    join = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=meeting,
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=heartbeat,
    )
    at = f" at {settings.address}" if settings else ""
    try:
        with _impatience(at, meeting):
            if settings is not None:
                join(
                    *settings,
                    cluster_detection_method="deactivate",
                )
            elif _on_cloud_tpu(environ):
                join()
            if jax.distributed.is_initialized():
                # Connects the devices while all processes are at the same place: later
                # one may compile for minutes, and the others would not wait for it.
                multihost_utils.sync_global_devices("samrobust")
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        message = f"Expected to meet the other processes of the run{at}, got: "
        raise DistributedError(f"{message}{first_line} {_REMEDY}") from error


_REMEDY = (
    "Check that all of them were started, with the same address and number, and that "
    "the port is free there and nothing blocks it."
)


@contextlib.contextmanager
def _impatience(at: str, limit: int) -> Iterator[None]:
    """Says what a process waits for, well before JAX gives up and ends it."""
    words = f"Still waiting for the other processes{at}, {limit} s at most. {_REMEDY}"
    timer = threading.Timer(
        min(30, limit / 2), lambda: print(f"samrobust: {words}", file=sys.stderr)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def find_settings(environ: Mapping[str, str]) -> Settings | None:
    """How to join the others; None for a single process, or where JAX finds out.

    Raises:
      ValueError: if the variables contradict each other.

    >>> find_settings({"JAX_COORDINATOR_ADDRESS": "node1:1234",
    ...                "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    Settings(address='node1:1234', num_processes=2, process_id=1, local_device_ids=None)
    """
    if environ.get("SAMROBUST_DISTRIBUTED", "").lower() in ("off", "0"):
        return None
    given = [name for name in _EXPLICIT if environ.get(name)]
    if given and given != [_EXPLICIT[0]]:
        return _explicit(environ, given)
    if all(name in environ for name in _SLURM):
        return _slurm(environ)
    check(
        not given,
        f"all of {', '.join(_EXPLICIT)}, or none outside a SLURM step",
        given=given,
    )
    return None


def _explicit(environ: Mapping[str, str], given: list[str]) -> Settings | None:
    check(given == list(_EXPLICIT), f"all of {', '.join(_EXPLICIT)}", given=given)
    count, index = (_integer(environ, name) for name in _EXPLICIT[1:])
    address = environ["JAX_COORDINATOR_ADDRESS"]
    check(
        re.search(r".:\d+$", address) is not None,
        "HOST:PORT",
        JAX_COORDINATOR_ADDRESS=address,
    )
    return _checked(address, count, index, _device_ids(environ))


def _slurm(environ: Mapping[str, str]) -> Settings | None:
    """Of a task of a SLURM step; an interactive shell is a step of one task."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or "1"
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        # The same on all nodes, another one for the next job: of the ephemeral range.
        job = _integer(environ, "SLURM_JOB_ID")
        port = environ.get("JAX_COORDINATOR_PORT") or str(61440 + job % 4096)
        address = f"{_first_host(environ['SLURM_STEP_NODELIST'])}:{port}"
    local = _device_ids(environ) or _slurm_device_ids(environ)
    return _checked(address, int(tasks), _integer(environ, "SLURM_PROCID"), local)


def _checked(
    address: str, count: int, index: int, local: tuple[int, ...] | None
) -> Settings | None:
    check(
        0 <= index < count, "0 <= process < processes", process=index, processes=count
    )
    return Settings(address, count, index, local) if count > 1 else None


def _first_host(nodes: str) -> str:
    """The first name of a SLURM node list.

    >>> [_first_host(n) for n in ("n1", "n1,m2", "gpu-[007-009,012],m2", "a[3]-ib")]
    ['n1', 'n1', 'gpu-007', 'a3-ib']
    """
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
    check(match is not None, "a SLURM node list", SLURM_STEP_NODELIST=nodes)
    assert match is not None
    return "".join(part or "" for part in match.groups())


def _slurm_device_ids(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPUs of a task: all of the node for its only task, else an even share.

    The numbers count the devices that SLURM lets this task see: where it binds one
    GPU to each task (`--gpus-per-task`), that is number 0 in all of them.
    """
    local, tasks = _integer(environ, "SLURM_LOCALID"), _tasks_here(environ)
    if tasks == 1:
        return None
    visible = [x for x in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
    if len(visible) == 1:
        return (0,)
    share = len(visible) // tasks if len(visible) % tasks == 0 else 0
    return tuple(range(local * share, (local + 1) * share)) if share else (local,)


def _tasks_here(environ: Mapping[str, str]) -> int:
    """Tasks of the step on this node, from a list such as `2(x3),1`."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get(
        "SLURM_TASKS_PER_NODE", "1"
    )
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    node = int(environ.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else counts[-1]


def _device_ids(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    text = environ.get("JAX_LOCAL_DEVICE_IDS", "")
    check(
        re.fullmatch(r"(\d+(,\d+)*)?", text) is not None,
        "numbers separated by commas",
        JAX_LOCAL_DEVICE_IDS=text,
    )
    return tuple(map(int, text.split(","))) if text else None


def _seconds(environ: Mapping[str, str], name: str, default: str) -> int:
    seconds = _integer(environ, name, default)
    check(seconds >= 1, f"1 <= {name}", **{name: seconds})
    return seconds


def _integer(environ: Mapping[str, str], name: str, default: str = "") -> int:
    text = environ.get(name, default)
    check(re.fullmatch(r"\d+", text) is not None, "a whole number", **{name: text})
    return int(text)


def _on_cloud_tpu(environ: Mapping[str, str]) -> bool:
    """Whether JAX runs on a TPU VM, alone or of several; imports no device."""
    from jax._src import cloud_tpu_init

    platforms = environ.get("JAX_PLATFORMS", "")
    wanted = not platforms or "tpu" in platforms
    off = environ.get("SAMROBUST_DISTRIBUTED", "").lower() in ("off", "0")
    return cloud_tpu_init.running_in_cloud_tpu_vm and wanted and not off
