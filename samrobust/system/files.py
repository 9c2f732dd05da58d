"""Files that are written whole or not at all, and read with care.

A file is replaced in one step, so that a kill at any moment leaves the old one or the
new one. Disks and object stores alike: `samrobust.system.storage`.
"""

import contextlib
import hashlib
import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from samrobust.system import storage

__all__ = [
    "WorkdirError",
    "append_json_line",
    "check_writable",
    "digest",
    "glance",
    "read_json",
    "read_json_lines",
    "read_object",
    "read_sealed",
    "seal",
    "set_aside",
    "unseal",
    "write_bytes",
    "write_json",
    "write_sealed",
    "write_text",
]


class WorkdirError(RuntimeError):
    """The workdir cannot be used for this run; the message says why and what to do."""


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a text file in one step; durable on return."""
    write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file in one step; durable on return.

    Raises:
      WorkdirError: if there is a folder of that name.
    """
    if not isinstance(path, storage.ObjectPath) and path.is_dir():
        raise WorkdirError(f"Expected a file {path}, got a folder. Move it away.")
    storage.replace(path, content)


def digest(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file, in hex digits; empty if there is none."""
    with contextlib.suppress(FileNotFoundError):
        if isinstance(path, storage.ObjectPath):
            return hashlib.sha256(path.read_bytes()).hexdigest()
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return ""


def set_aside(path: pathlib.Path) -> pathlib.Path:
    """Renames a file so that nothing reads it anymore, and nothing is lost."""
    names = (f"{path.name}.aside{number or ''}" for number in itertools.count())
    return path.rename(next(p for n in names if not (p := path.with_name(n)).exists()))


def check_writable(folder: pathlib.Path, *names: str) -> None:
    """Makes a directory and a file in it, before the work whose results go there.

    Args:
      folder: the directory.
      names: of files in it that are added to, where they are there.

    Raises:
      WorkdirError: if that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = storage.temporary_beside(folder / "probe")
        write_bytes(probe, b"probe")
        if not isinstance(folder, storage.ObjectPath):  # objects are never half written
            storage.remove_left_behind(folder, storage.modified(probe))
        probe.unlink()
        for name in names:
            path = folder / name
            if not isinstance(path, storage.ObjectPath) and path.exists():
                path.open("ab").close()
    except OSError as error:
        message = f"Expected a writable directory, got workdir={str(folder)!r}: {error}"
        raise WorkdirError(message) from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replaces a JSON file in one step."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_json_line(path: pathlib.Path, value: Any) -> None:
    """Adds an object to a JSON-lines file, as `storage.append`; durable on return."""
    text = json.dumps(value, allow_nan=False) + "\n"
    storage.append(path, text.encode())


def read_json(path: pathlib.Path) -> Any | None:
    """Returns the value in a JSON file; None if there is no such file.

    Raises:
      WorkdirError: if the file is damaged or is no file; names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise _damaged(path, "JSON", error) from error


def read_object(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file; None if there is no such file.

    Raises:
      WorkdirError: if the file is damaged or holds no object; names it.
    """
    value = read_json(path)
    if value is None and not path.exists():
        return None
    if not isinstance(value, dict):
        raise _damaged(path, "a JSON object", f"a {type(value).__name__}")
    return value


def write_sealed(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Replaces a JSON file in one step; `read_sealed` knows whether it is unchanged."""
    write_json(path, seal(value))


def read_sealed(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns what `write_sealed` wrote; None if there is no such file.

    Raises:
      WorkdirError: if it is not what was written; names the file.
    """
    value = read_object(path)
    return None if value is None else unseal(value, path)


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an object with its checksum, by which `unseal` knows it again."""
    return {**value, _SEAL: _checksum(value)}


def unseal(
    value: Mapping[str, Any], where: pathlib.Path | str, *, older: bool = False
) -> dict[str, Any]:
    """Returns an object without its checksum.

    Args:
      value: what was read.
      where: the file, for the message.
      older: whether none is as good, for older versions wrote none.

    Raises:
      WorkdirError: if it is not what was sealed.
    """
    content = {name: item for name, item in value.items() if name != _SEAL}
    found = value.get(_SEAL, "none, as before samrobust had them")
    if (_SEAL in value or not older) and found != (own := _checksum(content)):
        reason = f"its checksum is {found}, not {own}"
        raise _damaged(where, "the content that was written", reason)
    return content


_SEAL = "checksum"


def _checksum(value: Mapping[str, Any]) -> str:
    """Hashes a value's JSON form; tuples count as lists, order does not."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _damaged(path: pathlib.Path | str, wanted: str, got: object) -> WorkdirError:
    reason = " ".join(str(got).split())
    return WorkdirError(
        f"Expected {wanted} in {path}, got a damaged file ({reason}). Restore it from "
        "a copy, or use another directory."
    )


def glance(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file; empty if there is none that can be read.

    For readers while others write: whatever is there, it neither raises nor blocks.
    """
    try:
        # A pipe would not end; no store has any, and the question is a request there.
        is_safe = isinstance(path, storage.ObjectPath) or path.is_file()
        value = read_json(path) if is_safe else None
    except (OSError, RecursionError, WorkdirError):
        return {}
    return value if isinstance(value, dict) else {}


def read_json_lines(path: pathlib.Path, *, whole: bool = False) -> list[dict[str, Any]]:
    """Returns the objects of a JSON-lines file; other lines are left out.

    A kill may cut the last line off.

    Raises:
      WorkdirError: with `whole`, if any line before that is not a JSON object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = []
    texts = content.splitlines(keepends=True)
    for number, text in enumerate(texts, start=1):
        line = None
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
        if isinstance(line, dict):
            lines.append(line)
        elif whole and text.endswith(b"\n"):
            raise _damaged(path, "lines of JSON", f"see line {number}")
    return lines
