"""Settings of a process that runs experiments: compilation cache, signals.

Libraries must not touch such things; the `samrobust` command does, through this module
alone. What the user has set in the environment always wins.
"""

import contextlib
import os
import pathlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax

__all__ = ["StopRequest", "cache_folder", "enable_compilation_cache"]


def cache_folder() -> pathlib.Path:
    """`$XDG_CACHE_HOME/samrobust`, by default `~/.cache/samrobust`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "samrobust"


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a restart is fast.

    Does nothing if `JAX_COMPILATION_CACHE_DIR` is set (JAX heeds it by itself), or if
    `SAMROBUST_COMPILATION_CACHE=off`.
    """
    if os.environ.get("SAMROBUST_COMPILATION_CACHE", "").lower() in ("off", "0"):
        return
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = str(cache_folder() / "xla")
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class StopRequest:
    """Turns SIGTERM and Ctrl-C into a question that a loop can ask: `stop()`.

    The second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self._event.is_set()

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handles the signals inside the context; main thread only."""
        previous = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        self._event.set()
