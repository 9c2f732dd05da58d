"""Holders of a directory: the numbered files of `.claim/`, read and interpreted."""

import dataclasses
import functools
import os
import pathlib
import re
import socket
from typing import Any

from samrobust.system.files import glance
from samrobust.system.storage import modified

__all__ = [
    "LEASE",
    "LONGEST_LEASE",
    "Holder",
    "generations",
    "is_lease",
    "latest",
    "myself",
    "read_holder",
]

LEASE, LONGEST_LEASE = 120.0, 3600.0  # seconds


@dataclasses.dataclass(frozen=True)
class Holder:
    """The last process to claim a directory.

    Attributes:
      generation: the number of its claim.
      token: unique to this claim.
      host: its machine's name, for messages.
      machine: a name that processes share if they can see each other; empty if unknown.
      pid: of its process.
      started: when that process began, in the kernel's ticks; empty if unknown.
      lease: seconds after the last refresh at which others may take over.
      released: whether it is done.
      refreshed: the file server's time of the last refresh, in seconds.
    """

    generation: int
    token: str = ""
    host: str = "unknown"
    machine: str = ""
    pid: int = 0
    started: str = ""
    lease: float = LEASE
    released: bool = False
    refreshed: float = 0.0

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}"

    @property
    def process(self) -> tuple[str, int, str]:
        """What tells it from other processes."""
        return self.machine or self.host, self.pid, self.started

    @property
    def is_here(self) -> bool:
        """Whether the holder is, or was, a process that this one can see."""
        return bool(self.machine) and self.machine == _machine()

    @property
    def is_gone(self) -> bool:
        """Whether the holder's process is known to have ended."""
        return self.is_here and _start_of(self.pid) not in (self.started, None)

    def is_over(self, now: float) -> bool:
        """Tells whether the directory is free at a time of the file server."""
        return self.released or self.is_gone or now - self.refreshed > self.lease


def read_holder(workdir: pathlib.Path) -> Holder | None:
    """Returns the last to claim a directory, free or not; None if nobody ever did."""
    folder = workdir / ".claim"
    while generation := latest(folder):
        path = folder / f"{generation}.json"
        try:
            refreshed = modified(path)
        except FileNotFoundError:
            if latest(folder) == generation:  # a dangling link: nobody's
                return Holder(generation)
            continue  # pruned meanwhile
        known = _believable(glance(path))
        return Holder(**known | {"generation": generation, "refreshed": refreshed})
    return None


def _believable(content: dict[str, Any]) -> dict[str, Any]:
    """Keeps what a claim may say of its holder; all else counts as unknown."""
    kinds = {f.name: type(f.default) for f in dataclasses.fields(Holder)}
    known = {n: v for n, v in content.items() if type(v) is kinds.get(n)}
    if not is_lease(known.get("lease", LEASE)):
        del known["lease"]
    return known


def is_lease(seconds: float) -> bool:
    """Tells whether this is a valid lease, in seconds."""
    return 0 < seconds <= LONGEST_LEASE


def generations(folder: pathlib.Path) -> list[int]:
    """Returns the numbers in `.claim`, in any order."""
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
    return [int(stem) for stem in stems if re.fullmatch("[1-9][0-9]*", stem)]


def latest(folder: pathlib.Path) -> int:
    """Returns the highest number in `.claim`; 0 if there is none."""
    return max(generations(folder), default=0)


def myself() -> dict[str, Any]:
    """Returns what a claim says of this process: host, machine, pid, started."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "started": _start_of(pid) or "",
    }


@functools.cache
def _machine() -> str:
    """Names host, boot and PID namespace: processes of one name see each other.

    Containers of one host may share its name and its boot, and not see each other.
    """
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # without /proc the lease alone decides
        return ""


def _start_of(pid: int) -> str | None:
    """Returns when a process began, in ticks since boot; empty if it has ended.

    None of another user's, where /proc shows each user only their own (`hidepid`).
    """
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="latin-1")
    except OSError:
        return None if _is_alive(pid) else ""
    state, *fields = text.rpartition(")")[2].split()  # the name may hold anything
    return "" if state in "ZX" else fields[18]  # starttime, the 22nd of proc(5)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:  # it is another user's
        return True
    except (OSError, OverflowError):
        return False
    return True
