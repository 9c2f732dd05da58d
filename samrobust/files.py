"""Files that are written whole or not at all, and read with care.

A file is replaced in one step, so that a kill at any moment leaves the old one or the
new one; the names of files on their way are never the same in two processes, on one
machine or on several.
"""

import contextlib
import json
import os
import pathlib
import uuid
from typing import Any

__all__ = [
    "WorkdirError",
    "append_json_line",
    "glance",
    "read_json",
    "read_json_lines",
    "temporary_beside",
    "write_bytes",
    "write_json",
    "write_text",
]


class WorkdirError(RuntimeError):
    """The workdir cannot be used for this run; the message says why and what to do."""


def temporary_beside(path: pathlib.Path) -> pathlib.Path:
    """A hidden name in the same directory that nobody else uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a text file in one step; durable on return."""
    write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file in one step; durable on return."""
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


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


def glance(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none that can be read.

    For those who look on while others write: whatever lies there, nothing is raised
    and nothing waited for.
    """
    try:
        value = read_json(path) if path.is_file() else None  # a pipe would not end
    except (OSError, RecursionError, WorkdirError):
        return {}
    return value if isinstance(value, dict) else {}


def read_json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; what a kill cut off is dropped."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines
