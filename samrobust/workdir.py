"""The files of a run: written whole or not at all, and owned by one process.

A workdir holds `config.json`, `metrics.jsonl`, `checkpoints/`, `result.json`. A file is
replaced in one step, so that a kill at any moment leaves the old one or the new one.
"""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from samrobust.configuration import differences

__all__ = [
    "MetricsLog",
    "WorkdirError",
    "append_json_line",
    "claim",
    "read_json",
    "settle_config",
    "write_json",
    "write_text",
]

# What may change between two starts of the same run: none of it changes a result.
_MAY_CHANGE = ("data.data_dir", "data.manual_dir", "checkpoint.", "paper.")


class WorkdirError(RuntimeError):
    """The workdir cannot be used for this run; the message says why and what to do."""


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a file in one step; durable on return."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replaces a JSON file in one step."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_json_line(path: pathlib.Path, value: Any) -> None:
    """Adds an object to a JSON-lines file; durable on return."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: pathlib.Path) -> Any | None:
    """The value in a JSON file; None if there is no such file.

    Raises:
      WorkdirError: if the file is damaged; names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        message = (
            f"Expected JSON in {path}, got a damaged file ({error}). Restore it, or "
            "remove it to start anew."
        )
        raise WorkdirError(message) from error


@contextlib.contextmanager
def claim(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the directory and holds it for this process; freed on exit, even by a kill.

    Raises:
      WorkdirError: if it cannot be written, or another process holds it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        message = (
            f"Expected a writable directory, got workdir={str(workdir)!r}: {error}."
        )
        raise WorkdirError(message) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = (
                f"Another process is working in {workdir}. Wait for it, or choose "
                "another --workdir."
            )
            raise WorkdirError(message) from None
        for left_by_a_kill in workdir.glob(".*.tmp"):
            left_by_a_kill.unlink()
        yield


def settle_config(workdir: pathlib.Path, config: dict[str, Any]) -> None:
    """Writes `config.json`, or checks that the one there is of the same run.

    Raises:
      WorkdirError: if a field that shapes the result differs; names it.
    """
    path = workdir / "config.json"
    stored = read_json(path)
    changed = {} if stored is None else differences(stored, config)
    changed = {n: v for n, v in changed.items() if not n.startswith(_MAY_CHANGE)}
    if changed:
        listed = "; ".join(
            f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items()
        )
        message = (
            f"{workdir} holds a run of another config: {listed}. Choose another "
            "--workdir, or restore the field."
        )
        raise WorkdirError(message)
    write_json(path, config)


class MetricsLog:
    """`metrics.jsonl`: an object an epoch, in order, each epoch once."""

    def __init__(self, path: pathlib.Path, *, last_step: int):
        """Opens the log and drops what lies after the step a run goes on from."""
        self._path = path
        kept = [line for line in _read_lines(path) if line["step"] <= last_step]
        self.lines = kept
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, line: dict[str, Any]) -> None:
        """Adds an epoch; durable on return."""
        self.lines.append(line)
        append_json_line(self._path, line)


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; one cut off by a kill is dropped."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
