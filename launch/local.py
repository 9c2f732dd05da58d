#!/usr/bin/env python3
"""Runs a command several times on this machine, on each device or as one over all.

    python launch/local.py --each -- samrobust table --config=... --workdir=...
    python launch/local.py --processes=2 -- samrobust train --config=... --workdir=...

With --each every GPU or TPU chip has a worker of its own, --each=3 three of them. They
share the workdir of a table, where each takes the next run that no other holds, and one
that dies leaves its run to the others.

Without, JAX makes the processes into one. Each gets its share of the GPUs, or with
--cpu virtual devices. When one dies, the others have --grace seconds to end by
themselves.

Process 0 keeps the terminal; the others' lines go to stderr with their number in front,
with --each only those of their stderr. SIGTERM, SIGUSR1, Ctrl-C and a closed terminal
reach every process once, as SIGTERM: samrobust saves and stops. The second Ctrl-C
kills. None outlives this one, however it ends (on Linux).

Exit codes: 75 stopped on request, start the same command again; else that of the first
process that failed, 128 + N if signal N killed it; 130 after a second Ctrl-C.

Needs nothing but Python. On a TPU host one process drives all chips, but with --each.
"""

import argparse
import contextlib
import ctypes
import glob
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

__all__ = ["main"]

_BAD_INPUT, _STOPPED, _KILLED_BY_HAND = 2, 75, 130
_PDEATHSIG = 1  # from Linux's prctl.h
_POLL = 0.1  # seconds
_LIBC = ctypes.CDLL(None)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    options = _parse(argv)
    try:
        devices = _share_devices(options)
    except ValueError as error:
        print(f"local.py: error: {error}", file=sys.stderr)
        return _BAD_INPUT
    meeting = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{_free_port()}",
        "JAX_NUM_PROCESSES": str(len(devices)),
    }
    group = _Group(options.grace, alone=bool(options.each))
    try:
        for index, settings in enumerate(devices):
            joint = {**meeting, "JAX_PROCESS_ID": str(index)}
            own = {"SAMROBUST_DISTRIBUTED": "off"} if options.each else joint
            group.start(options.command, {**os.environ, **own, **settings})
        return group.wait()
    except OSError as error:
        print(f"local.py: error: {error}", file=sys.stderr)
        return _BAD_INPUT
    finally:
        group.kill()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="local.py",
        allow_abbrev=False,
        usage="%(prog)s [options] -- COMMAND ...",
        description=(__doc__ or "").partition("\n")[0],
    )
    add = parser.add_argument
    add("--processes", type=int, metavar="N", help="default: 2")
    add(
        "--each",
        type=int,
        nargs="?",
        const=1,
        metavar="K",
        help="K workers on each GPU (1 if left out), or one on each TPU chip",
    )
    add(
        "--devices-per-process",
        type=int,
        metavar="K",
        help="default: the GPUs split evenly; 1 with --cpu",
    )
    add("--cpu", action="store_true", help="virtual devices on the CPU, no GPUs")
    add(
        "--grace",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that the others have when a process dies; default: 30",
    )
    add("command", nargs="+", metavar="COMMAND", help="after --")
    options = parser.parse_args(argv)
    if options.each and (options.processes or options.devices_per_process):
        parser.error("Expected --each or --processes, --devices-per-process, got both.")
    for name in ("processes", "devices_per_process", "each"):
        value = getattr(options, name)
        if value is not None and value < 1:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"Expected {flag} >= 1, got {value}.")
    return options


def _share_devices(options: argparse.Namespace) -> list[dict[str, str]]:
    """For each process, the settings that tell it its devices.

    JAX_LOCAL_DEVICE_IDS counts within CUDA_VISIBLE_DEVICES, which stays as it is:
    processes that see each other's GPUs exchange data without the host. A process by
    itself would not read it, and sees its GPUs alone.
    """
    count, each = options.processes or 2, options.devices_per_process
    if options.each:
        return _one_device_each(options.each, cpu=options.cpu)
    if options.cpu:
        return [_CPU | {"JAX_NUM_CPU_DEVICES": str(each or 1)}] * count
    gpus = _gpus()
    num_gpus = len(gpus)
    each = each or max(num_gpus // count, 1)
    if count * each > num_gpus:
        message = (
            f"Expected {count} x {each} GPUs, got {num_gpus}. Ask for fewer "
            "processes or devices, or for --cpu."
        )
        raise ValueError(message)
    if count == 1:
        return [_CUDA | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[:each])}]
    return [
        _CUDA | {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(first, first + each)))}
        for first in range(0, count * each, each)
    ]


# By name: without the driver an error, and no run on the CPU.
_CPU, _CUDA, _TPU = ({"JAX_PLATFORMS": name} for name in ("cpu", "cuda,cpu", "tpu,cpu"))


def _one_device_each(workers: int, *, cpu: bool) -> list[dict[str, str]]:
    """For so many workers on every device, the settings that show it alone."""
    # Else each would take three quarters of the GPU's memory.
    part = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / workers:.2f}"}
    share = part if workers > 1 else {}
    gpus = [_CUDA | {"CUDA_VISIBLE_DEVICES": gpu} for gpu in _gpus()]
    if cpu or gpus:
        return [_CPU] * workers if cpu else [gpu | share for gpu in gpus] * workers
    # Chips have device files, numbered or named by their groups of VFIO.
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    if not chips or workers > 1:
        message = (
            f"Expected GPUs, or TPU chips with --each=1, got {len(chips)} chips. See "
            "--cpu."
        )
        raise ValueError(message)
    bounds = ("TPU_CHIPS_PER_PROCESS_BOUNDS", "TPU_PROCESS_BOUNDS")
    one = _TPU | dict.fromkeys(bounds, "1,1,1") | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return [one | {"TPU_VISIBLE_CHIPS": str(chip)} for chip in range(len(chips))]


def _gpus() -> list[str]:
    """The names of the GPUs that a process of this environment sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    lines = listing.stdout.splitlines()
    return [str(k) for k in range(sum(line.startswith("GPU ") for line in lines))]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class _Group:
    """The processes: their output, what they are told, and how they ended."""

    def __init__(self, grace: float, *, alone: bool) -> None:
        """Hears signals from now on.

        Args:
          grace: as the flag.
          alone: whether each goes on when another dies, and says less.
        """
        self._grace, self._alone = float("inf") if alone else grace, alone
        self._processes: list[subprocess.Popen[bytes]] = []
        self._codes: dict[int, int] = {}  # by index, in the order of their ends
        self._output = selectors.DefaultSelector()
        self._unfinished: dict[int, bytes] = {}  # by index, a line without its end
        self._interrupts = 0
        self._asked = self._told = self._killed_by_hand = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:
                signal.signal(number, self._handle)  # `nohup` ignores SIGHUP

    def start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """Starts the next process, in a session of its own: Ctrl-C comes from us."""
        index, parent = len(self._processes), os.getpid()
        output, errors = subprocess.PIPE, subprocess.STDOUT
        if self._alone:  # what process 0 prints is the same
            output, errors = subprocess.DEVNULL, subprocess.PIPE
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output if index else None,
            stderr=errors if index else None,
            start_new_session=True,
            preexec_fn=lambda: _die_with(parent),
        )
        self._processes.append(process)
        if pipe := process.stdout or process.stderr:
            os.set_blocking(pipe.fileno(), False)
            self._output.register(pipe, selectors.EVENT_READ, index)

    def wait(self) -> int:
        """Waits for all, and ends those that a dead one leaves behind.

        Returns:
          The exit code of this program.
        """
        deadline = float("inf")
        while len(self._codes) < len(self._processes):
            self._show_output(_POLL)
            self._tell()
            self._collect()
            if self._first_failure() is not None:
                deadline = min(deadline, time.monotonic() + self._grace)
            if time.monotonic() > deadline:
                self.kill()
        while self._show_output(0):
            pass
        return self._exit_code()

    def kill(self) -> None:
        """Kills what still runs, with all that it started."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._asked = True
        self._interrupts += number == signal.SIGINT

    def _tell(self) -> None:
        if self._asked and not self._told:
            self._told = True
            for process in self._processes:
                process.terminate()
        if self._interrupts > 1 and not self._killed_by_hand:
            self._killed_by_hand = True
            self.kill()

    def _collect(self) -> None:
        for index, process in enumerate(self._processes):
            if index not in self._codes and process.poll() is not None:
                self._codes[index] = self._read_code(process.returncode)

    def _read_code(self, code: int) -> int:
        if code == -signal.SIGTERM and self._told:
            return _STOPPED  # told before it could listen: it has nothing to save
        return code if code >= 0 else 128 - code

    def _first_failure(self) -> int | None:
        failures = (c for c in self._codes.values() if c not in (0, _STOPPED))
        return next(failures, None)

    def _exit_code(self) -> int:
        if self._killed_by_hand:
            return _KILLED_BY_HAND
        return self._first_failure() or max(self._codes.values())

    def _show_output(self, seconds: float) -> bool:
        """Passes on what the processes other than 0 print, in whole lines.

        Returns:
          Whether there was anything within `seconds`.
        """
        if not self._output.get_map():
            time.sleep(seconds)
            return False
        ready = self._output.select(seconds)
        for key, _ in ready:
            text = os.read(key.fd, 2**16)
            lines = (self._unfinished.pop(key.data, b"") + text).splitlines(True)
            if not text:
                self._output.unregister(key.fileobj)
            elif not lines[-1].endswith(b"\n"):
                self._unfinished[key.data] = lines.pop()
            with contextlib.suppress(OSError):  # a terminal that was closed
                for line in lines:
                    sys.stderr.buffer.write(b"[%d] %s\n" % (key.data, line.rstrip()))
                sys.stderr.flush()
        return bool(ready)


def _die_with(parent: int) -> None:
    """In the child: the kernel kills it when the parent is gone."""
    if sys.platform == "linux":
        _LIBC.prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone before it could be said
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
