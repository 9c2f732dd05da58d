#!/usr/bin/env python3
"""Runs a command as several processes on this machine, which JAX makes into one.

    python launch/local.py --processes=2 -- samrobust train --config=... --workdir=...

Every process gets its share of the GPUs, or with --cpu virtual devices. Process 0 keeps
the terminal; what the others print goes to stderr with their number in front.

SIGTERM and Ctrl-C reach every process once, as SIGTERM: samrobust saves and stops. The
second Ctrl-C kills. When a process dies, the others have --grace seconds to end by
themselves. None outlives this one, however it ends (on Linux).

Exit codes: 75 stopped on request, start the same command again; else that of the first
process that failed, 128 + N if signal N killed it; 130 after a second Ctrl-C.

Needs nothing but Python. On a TPU host it is not needed: one process drives all chips.
"""

import argparse
import ctypes
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
    common = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{_free_port()}",
        "JAX_NUM_PROCESSES": str(options.processes),
    }
    group = _Group(options.grace)
    try:
        for index, settings in enumerate(devices):
            identity = {"JAX_PROCESS_ID": str(index)}
            group.start(options.command, {**common, **identity, **settings})
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
    add("--processes", type=int, default=2, metavar="N", help="default: 2")
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
    for name in ("processes", "devices_per_process"):
        value = getattr(options, name)
        if value is not None and value < 1:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"Expected {flag} >= 1, got {value}.")
    return options


def _share_devices(options: argparse.Namespace) -> list[dict[str, str]]:
    """For each process, the settings that tell it its devices.

    JAX_LOCAL_DEVICE_IDS counts within CUDA_VISIBLE_DEVICES, which stays as it is:
    processes that see each other's GPUs exchange data without the host.
    """
    processes, each = options.processes, options.devices_per_process
    if options.cpu:
        cpus = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(each or 1)}
        return [cpus] * processes
    num_gpus = _count_gpus()
    each = each or max(num_gpus // processes, 1)
    if processes * each > num_gpus:
        message = (
            f"Expected {processes} x {each} GPUs, got {num_gpus}. Ask for fewer "
            "processes or devices, or for --cpu."
        )
        raise ValueError(message)
    return [
        {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(first, first + each)))}
        for first in range(0, processes * each, each)
    ]


def _count_gpus() -> int:
    """The GPUs that a process of this environment sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class _Group:
    """The processes: their output, what they are told, and how they ended."""

    def __init__(self, grace: float) -> None:
        """Hears signals from now on; `grace` as the flag."""
        self._grace = grace
        self._processes: list[subprocess.Popen[bytes]] = []
        self._codes: dict[int, int] = {}  # by index, in the order of their ends
        self._output = selectors.DefaultSelector()
        self._unfinished: dict[int, bytes] = {}  # by index, a line without its end
        self._interrupts = 0
        self._asked = self._told = self._killed_by_hand = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._handle)

    def start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """Starts the next process, in a session of its own: Ctrl-C comes from us."""
        index, parent = len(self._processes), os.getpid()
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if index else None,
            stderr=subprocess.STDOUT if index else None,
            start_new_session=True,
            preexec_fn=lambda: _die_with(parent),
        )
        self._processes.append(process)
        if process.stdout:
            os.set_blocking(process.stdout.fileno(), False)
            self._output.register(process.stdout, selectors.EVENT_READ, index)

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
