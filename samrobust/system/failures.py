"""Failures: `failure.json`, why the last attempt at a run failed; what passes by."""

import contextlib
import errno
import os
import pathlib
import socket
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from samrobust.system.files import WorkdirError, glance, write_json

__all__ = ["describe", "is_transient", "read_failure", "recording_failure"]

_TRACEBACK = 4000  # characters of its end
# Of a disk or a network that is away: of file servers, above all. A full disk, or a
# permission, would be the same again.
_PASSING = {
    *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ENETDOWN, errno.ENETUNREACH),
    *(errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
}


def is_transient(error: BaseException | None) -> bool:
    """Tells whether an error, or what caused it, may well be gone at the next attempt.

    A disk or a network that is away; what another process found so, too.
    """
    while error is not None:
        away = isinstance(error, ConnectionError | TimeoutError)
        if away or (isinstance(error, OSError) and error.errno in _PASSING):
            return True
        if getattr(error, "samrobust_is_transient", False):
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def recording_failure(
    workdir: pathlib.Path, *, is_failure: Callable[[Exception], bool] = lambda _: True
) -> Iterator[None]:
    """Writes an error of the context into `failure.json`; success removes that file.

    Args:
      workdir: of the run; claimed.
      is_failure: tells the errors to record from those that leave the file alone.
    """
    path = workdir / "failure.json"
    try:
        yield
    except Exception as error:
        if not is_failure(error):
            raise
        try:
            write_json(path, _record(error))
        except (OSError, WorkdirError) as problem:  # a full disk may be what went wrong
            warnings.warn(f"Could not write {path}: {problem}", stacklevel=2)
        raise
    path.unlink(missing_ok=True)


def read_failure(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns the content of `failure.json`; None if the last attempt did not fail.

    Returns:
      `id` (of this attempt alone), `error` (the class), `message`, `traceback` (its
      end), `host`, `pid` and `provenance`.
    """
    return glance(workdir / "failure.json") or None


def describe(error: Exception) -> str:
    """Returns class and message in one line; a class of ours is left out."""
    text = " ".join(str(error).split())
    if type(error).__module__.startswith("samrobust.") and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _record(error: Exception) -> dict[str, Any]:
    # Loads JAX, which readers of the file do without.
    from samrobust.system.provenance import provenance

    trace = "".join(traceback.format_exception(error))
    try:
        where = provenance()
    except Exception as problem:  # the device may be what went wrong
        where = {"error": str(problem)}
    return {
        "id": uuid.uuid4().hex,
        "error": type(error).__name__,
        "message": describe(error),
        "traceback": trace[-_TRACEBACK:],
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "provenance": where,
    }
