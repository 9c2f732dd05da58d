"""A real SLURM on this machine: munge, a controller, a few nodes on loopback.

Every node is a `slurmd` of its own and has look-alikes of GPUs. The nodes are named by
their addresses, which resolve anywhere, so that JAX finds its coordinator in the list
of nodes as it would on a cluster. A job in the partition `high` preempts those in
`low`: they are told to stop, and have a minute for it.

Needs root, slurm-wlm and munge of Debian or Ubuntu; no systemd, no database.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator

__all__ = ["Cluster", "start_cluster", "why_not"]

_PROGRAMS = ("munged", "slurmctld", "slurmd", "setpriv")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_LONGEST = 300  # seconds, on however busy a machine
_NULL_DEVICE = os.makedev(1, 3)
_CONF = """
ClusterName=samrobust
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdParameters=config_overrides
MailProg=/bin/true
KillWait=5
GresTypes=gpu
NodeName={names} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} \
CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE
"""


def why_not() -> str:
    """Why no SLURM can run here; empty if one can."""
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"needs slurm-wlm and munge; there is no {', '.join(missing)}"
    return "" if os.geteuid() == 0 else "needs root, to start SLURM's daemons"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A running SLURM: its commands, and what became of a job."""

    folder: pathlib.Path
    environment: dict[str, str]

    def run(
        self,
        *command: str | pathlib.Path,
        cwd: pathlib.Path | None = None,
        **environment: str,
    ) -> str:
        """What a command prints; it must succeed."""
        done = subprocess.run(
            [str(word) for word in command],
            env={**self.environment, **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=_LONGEST,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        line = self.run("scontrol", "show", "job", "-o", job).splitlines()[0]
        fields = (word.partition("=") for word in line.split() if "=" in word)
        return {name: value for name, _, value in fields}

    def wait(self, job: str, *states: str) -> dict[str, str]:
        """Waits until the job is in one of the states; gives its fields."""
        wait_until(lambda: self.job(job)["JobState"] in states, self, job)
        return self.job(job)

    def hasten(self, job: str, *, restarts: int = 1) -> None:
        """Starts a requeued job now; SLURM would let it wait for two minutes."""

        def is_requeued() -> bool:
            known = self.job(job)
            return (known["Restarts"], known["JobState"]) == (f"{restarts}", "PENDING")

        wait_until(is_requeued, self, job)
        time.sleep(2)  # a node refuses what it ended in the same second
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now")


def wait_until(condition: Callable[[], object], cluster: Cluster, about: str) -> None:
    """Polls; in the end says what SLURM knows."""
    end = time.monotonic() + _LONGEST
    while not condition():
        if time.monotonic() > end:
            known = cluster.run("squeue", "--states=all", "--format=%i %j %T %r %M %N")
            message = f"waited {_LONGEST} s for {about}; squeue: {known}"
            raise TimeoutError(message)
        time.sleep(0.1)


@contextlib.contextmanager
def start_cluster(
    folder: pathlib.Path, *, nodes: int = 2, cpus: int = 2, gpus: int = 2
) -> Iterator[Cluster]:
    """Starts a SLURM in an empty folder; nothing of it is left afterwards."""
    cluster = Cluster(folder, _environment(folder))
    names = [f"127.0.0.{node + 1}" for node in range(nodes)]
    _write_files(folder, names, cpus=cpus, gpus=gpus)
    daemons = [["munged", "--foreground", *_munge_options(folder)]]
    daemons += [["slurmctld", "-D", "-c"]]
    daemons += [["slurmd", "-D", "-N", name] for name in names]
    started = []
    try:
        for command in daemons:
            started.append(_start(command, cluster))
            if command[0] == "munged":
                socket = folder / "munge" / "socket"
                wait_until(socket.exists, cluster, "munge")
        wait_until(lambda: _is_ready(cluster, nodes), cluster, "the nodes")
        yield cluster
    finally:
        _end(started, cluster)


def _environment(folder: pathlib.Path) -> dict[str, str]:
    # What an enclosing SLURM job says of itself must not reach the jobs in here.
    outer = ("SLURM", "SBATCH", "SRUN")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    return {**kept, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}


def _write_files(
    folder: pathlib.Path, names: list[str], *, cpus: int, gpus: int
) -> None:
    for name in ("state", "munge"):
        (folder / name).mkdir()
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    for gpu in range(gpus):
        os.mknod(folder / f"gpu{gpu}", stat.S_IFCHR | 0o666, _NULL_DEVICE)
    controller, *ports = _free_ports(1 + len(names))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 9 // 10
    values = {
        "folder": folder,
        "host": socket.gethostname().partition(".")[0],
        "controller_port": controller,
        "names": ",".join(names),
        "ports": ",".join(map(str, ports)),
        "cpus": cpus,
        "gpus": gpus,
        "memory": memory // 2**20,
    }
    (folder / "slurm.conf").write_text(_CONF.format(**values))
    devices = f"Name=gpu File={folder}/gpu[0-{gpus - 1}]"
    (folder / "gres.conf").write_text(f"NodeName={values['names']} {devices}\n")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _munge_options(folder: pathlib.Path) -> list[str]:
    files = {
        "key": "key-file",
        "socket": "socket",
        "pid": "pid-file",
        "log": "log-file",
    }
    options = {option: folder / "munge" / name for name, option in files.items()}
    options["seed-file"] = folder / "munge" / "seed"
    return ["--force", *(f"--{option}={path}" for option, path in options.items())]


def _start(command: list[str], cluster: Cluster) -> subprocess.Popen[bytes]:
    """A daemon that dies with this process, however that ends."""
    with (cluster.folder / "daemons.log").open("ab") as log:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", *command],
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C ends the jobs first, in `_end`
        )


def _is_ready(cluster: Cluster, nodes: int) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--partition=low", "--format=%T %D"],
        env=cluster.environment,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() == f"idle {nodes}"


def _end(daemons: list[subprocess.Popen[bytes]], cluster: Cluster) -> None:
    for daemon in daemons:
        daemon.kill()
        daemon.wait()
    # Jobs do not end with the daemons. All have this in their environment.
    mark = f"SLURM_CONF={cluster.environment['SLURM_CONF']}".encode()
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
