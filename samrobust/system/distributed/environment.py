"""The environment that a process was started in, as one of several or alone.

Several processes, one per machine or per device, run the same command; together they
are one run. Environment variables say where they meet:

- `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`: by hand, by
  Kubernetes, by `launch/local.py`; these take precedence.
- Open MPI's `OMPI_COMM_WORLD_*`, which leave out the address.
- a SLURM step of several tasks, inside `srun`.
- SkyPilot's `SKYPILOT_*`, a process a node.
- `NNODES` and `NODE_RANK` beside an address, as xpk sets them on GPU nodes.
- a Cloud TPU: JAX finds the other workers of the slice.

The address is HOST:PORT, or HOST with `JAX_COORDINATOR_PORT`.

Anything else, or `SAMROBUST_DISTRIBUTED=off`, is a single process.
"""

import os
import re
from typing import NamedTuple

from samrobust.checks import check
from samrobust.system.jax_internals import in_cloud_tpu_vm
from samrobust.system.runtime import is_off

__all__ = ["Settings", "find_settings", "on_cloud_tpu", "read_seconds", "starts_first"]

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
_SKYPILOT = ("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS")
_XPK = ("JAX_COORDINATOR_ADDRESS", "NNODES", "NODE_RANK")
_PORT = "8476"  # where JAX itself lets the workers of a TPU slice meet


class Settings(NamedTuple):
    """The settings by which a process joins the others.

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


def find_settings() -> Settings | None:
    """Finds how to join the others; None for a single process, or where JAX finds out.

    Raises:
      ValueError: if the variables contradict each other.
    """
    if is_off("SAMROBUST_DISTRIBUTED"):
        return None
    given = [name for name in _EXPLICIT if os.environ.get(name)]
    if given and given != [_EXPLICIT[0]]:
        check(given == list(_EXPLICIT), f"all of {', '.join(_EXPLICIT)}", given=given)
        return _settings(*_EXPLICIT[1:])
    if all(os.environ.get(name) for name in _OPEN_MPI):
        local = _integer("OMPI_COMM_WORLD_LOCAL_RANK", "0")
        tasks = _integer("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
        return _settings(*_OPEN_MPI, share=_share(local, tasks))
    if all(name in os.environ for name in _SLURM):
        return _slurm()
    if all(os.environ.get(name) for name in _SKYPILOT) and not on_cloud_tpu():
        first, *_ = os.environ["SKYPILOT_NODE_IPS"].split()
        return _settings(*_SKYPILOT[:2], host=first, port=_PORT)
    if all(os.environ.get(name) for name in _XPK):
        return _settings(*_XPK[1:])
    check(
        not given,
        f"all of {', '.join(_EXPLICIT)}, or none outside a SLURM step",
        given=given,
    )
    return None


def starts_first() -> bool:
    """Tells whether this process is alone or will be process 0, as far as is known.

    For work that one process does without joining the others.
    """
    settings = find_settings()
    return settings is None or settings.process_id == 0


def on_cloud_tpu() -> bool:
    """Tells whether JAX runs on a TPU VM, alone or of several; asks for no device."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    wanted = not platforms or "tpu" in platforms
    return in_cloud_tpu_vm() and wanted and not is_off("SAMROBUST_DISTRIBUTED")


def read_seconds(name: str, default: str) -> int:
    """Reads a whole number of seconds, at least 1 and at most a week.

    Raises:
      ValueError: if it is none.
    """
    seconds = _integer(name, default)
    check(1 <= seconds <= _WEEK, f"1 <= {name} <= {_WEEK}", **{name: seconds})
    return seconds


_WEEK = 7 * 86400


def _slurm() -> Settings | None:
    """Reads the settings of a SLURM task; an interactive shell is one task."""
    step = "SLURM_STEP_NUM_TASKS"
    tasks = step if os.environ.get(step) else "SLURM_NTASKS"
    # The same on all nodes, another one for the next job: of the ephemeral range.
    port = str(61440 + _integer("SLURM_JOB_ID") % 4096)
    host = _first_host(os.environ["SLURM_STEP_NODELIST"])
    share = _share(_integer("SLURM_LOCALID"), _tasks_here())
    names = tasks, "SLURM_PROCID"
    return _settings(*names, share=share, host=host, port=port)


def _settings(
    count_name: str,
    index_name: str,
    *,
    share: tuple[int, ...] | None = None,
    host: str = "",
    port: str = "",
) -> Settings | None:
    """Reads the settings from variables of these names; None for a single process.

    Args:
      count_name: of the number of processes.
      index_name: of the number of this one.
      share: its devices, without `JAX_LOCAL_DEVICE_IDS`.
      host: where the processes meet, without `JAX_COORDINATOR_ADDRESS`.
      port: that goes with it.
    """
    ids = os.environ.get("JAX_LOCAL_DEVICE_IDS", "")
    check(
        re.fullmatch(r"(\d+(,\d+)*)?", ids) is not None,
        "numbers separated by commas",
        JAX_LOCAL_DEVICE_IDS=ids,
    )
    local = tuple(map(int, ids.split(","))) if ids else share
    count, index = _integer(count_name, "1"), _integer(index_name)
    check(
        0 <= index < count, "0 <= process < processes", process=index, processes=count
    )
    if count == 1:
        return None
    return Settings(_address(host, port), count, index, local)


def _address(host: str, port: str) -> str:
    given = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    own_port = os.environ.get("JAX_COORDINATOR_PORT", "")
    address = given or f"{host}:{own_port or port}"
    if ":" not in address and own_port:
        address = f"{address}:{own_port}"
    check(
        re.search(r"\A[^:].*:[0-9]{1,5}\Z", address) is not None
        and 0 < int(address.rpartition(":")[2]) < 2**16,
        "HOST:PORT, of process 0 (or HOST, and JAX_COORDINATOR_PORT)",
        JAX_COORDINATOR_ADDRESS=given or address,
    )
    return address


def _first_host(nodes: str) -> str:
    """Returns the first name of a SLURM node list.

    Without `scontrol show hostnames`, which containers rarely have.

    >>> [_first_host(n) for n in ("n1", "n1,m2", "gpu-[007-009,012],m2", "a[3]-ib")]
    ['n1', 'n1', 'gpu-007', 'a3-ib']
    >>> _first_host("rack[1-2]node[3-4,9],rack7")
    'rack1node3'
    """
    first = re.match(r"([^,\[]|\[[^\]]*\])+", nodes)
    check(first is not None, "a SLURM node list", SLURM_STEP_NODELIST=nodes)
    assert first is not None
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _share(local: int, tasks: int) -> tuple[int, ...] | None:
    """Returns a task's GPUs: all of the node for its only task, else an even share.

    The numbers count the devices that this task may see: where SLURM binds one GPU to
    each task (`--gpus-per-task`), that is number 0 in all of them.
    """
    if tasks == 1:
        return None
    visible = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
    if len(visible) == 1:
        return (0,)
    share = len(visible) // tasks if len(visible) % tasks == 0 else 0
    return tuple(range(local * share, (local + 1) * share)) if share else (local,)


def _tasks_here() -> int:
    """Counts the tasks of the step on this node, from a list such as `2(x3),1`."""
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get(
        "SLURM_TASKS_PER_NODE", "1"
    )
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    node = _integer("SLURM_NODEID", "0")
    return counts[node] if node < len(counts) else counts[-1]


def _integer(name: str, default: str = "") -> int:
    text = os.environ.get(name) or default
    check(
        re.fullmatch("[0-9]{1,18}", text) is not None, "a whole number", **{name: text}
    )
    return int(text)
