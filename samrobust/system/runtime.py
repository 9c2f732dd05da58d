"""Settings of a process that runs experiments: memory, cache, signals.

Libraries must not touch these; the `samrobust` command does, only through this module.
What the user has set in the environment takes precedence. JAX is imported late,
since signals must be handled and messages printed before.
"""

import atexit
import contextlib
import ctypes
import errno
import functools
import gc
import os
import pathlib
import signal
import stat
import sys
import termios
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from samrobust.checks import check_choice, shorten

__all__ = [
    "BAD_INPUT",
    "EXIT_CODES",
    "FAILED",
    "RESUME",
    "TRANSIENT",
    "OutputError",
    "StopRequest",
    "answered",
    "cache_folder",
    "collect_garbage_seldom",
    "enable_compilation_cache",
    "end_on_signals",
    "is_off",
    "keep_freed_memory",
    "leave_terminal",
    "one_line",
    "say",
    "trusted_cache_folder",
    "usable_cores",
]

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_RESERVE, _HUGE_PAGE = 2**32, 2**21  # bytes; huge pages as on x86-64
_MADV_HUGEPAGE = 14  # from Linux's mman.h


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # of Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cache_folder() -> pathlib.Path:
    """Returns `$XDG_CACHE_HOME/samrobust`, by default `~/.cache/samrobust`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # to be ignored, by the specification
        base = os.path.expanduser("~/.cache")
    return pathlib.Path(base) / "samrobust"


def trusted_cache_folder(name: str = "") -> pathlib.Path | None:
    """Makes the cache folder, or one within; returns None if it is not private.

    Compiled programs and arrays are loaded from there and trusted. So only the user may
    write to it; it is made with mode 0700.

    Args:
      name: of the folder within, as `xla`; empty for the cache folder itself.

    Warns:
      UserWarning: once a process, where it is not this user's alone or cannot be made.
    """
    return _private(cache_folder()) and _private(cache_folder() / name)


@functools.cache
def _private(folder: pathlib.Path) -> pathlib.Path | None:
    try:
        if not folder.is_absolute():
            raise FileNotFoundError("there is no home directory")
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid():
            problem = f"is owned by user {found.st_uid}. Remove it, or set"
        elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            problem = "can be written by others. Remove it, or set"
        elif not os.access(folder, os.W_OK):
            problem = "cannot be written. Set"
        else:
            return folder
    except OSError as error:
        problem = f"cannot be made ({error}). Set"
    message = f"The cache {folder} is not used: it {problem} XDG_CACHE_HOME."
    warnings.warn(message, stacklevel=3)
    return None


def is_off(name: str) -> bool:
    """Tells whether a variable of the environment switches something off.

    Raises:
      ValueError: if it is neither on nor off.
    """
    wanted = os.environ.get(name, "").lower() or "on"
    check_choice(("on", "off", "1", "0"), **{name: wanted})
    return wanted in ("off", "0")


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a restart is fast.

    Programs with oneDNN's convolutions are compiled again in each process: jaxlib 0.12
    cannot write them, and its warning, of memory that has run out, is not shown.

    Does nothing if `JAX_COMPILATION_CACHE_DIR` is set (JAX reads it by itself), or if
    `SAMROBUST_COMPILATION_CACHE=off`; nor where the folder is not this user's alone.

    Raises:
      ValueError: if `SAMROBUST_COMPILATION_CACHE` is neither on nor off.
    """
    unwanted = is_off("SAMROBUST_COMPILATION_CACHE")
    unwritten = "Error writing persistent compilation cache entry .*: std::bad_alloc"
    warnings.filterwarnings("ignore", unwritten)
    if unwanted or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    if folder := trusted_cache_folder("xla"):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def collect_garbage_seldom() -> None:
    """Makes Python look for unreachable cycles after 100,000 new objects.

    Loading JAX and tracing make many objects that stay. Looking through them again and
    again, and three times at the end, is a quarter of the time of a short command. Call
    it before JAX is loaded.
    """
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)


def keep_freed_memory() -> bool:
    """Makes glibc keep what is freed instead of handing it back to the kernel.

    XLA's CPU client allocates the memory of a program again at every call. If glibc
    returns it to the kernel meanwhile, it comes back as fresh pages: a tenth of a
    training step goes into faulting them in. Linux with glibc only; does nothing where
    `MALLOC_*` or `GLIBC_TUNABLES` are set in the environment.

    Returns:
      Whether the allocator took the settings.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1))
    if not all(mallopt(name, value) == 1 for name, value in settings):
        return False
    _prepare_heap()
    return True


def _prepare_heap() -> None:
    """Marks the heap that is still to come for huge pages: fewer faults, fewer misses.

    The block is reserved and freed untouched, so it takes no memory before it is used.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(_RESERVE)
    if block:
        start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(start, block + _RESERVE - start, _MADV_HUGEPAGE)
        libc.free(block)


# Exit codes; the last for what may well be gone at the next attempt: launchers start
# it again. Those of signals:
FAILED, BAD_INPUT, TRANSIENT = 1, 2, 69
EXIT_CODES = {
    **{signal.SIGTERM: 75, signal.SIGINT: 130},
    **{signal.SIGHUP: 75, signal.SIGUSR1: 75},  # a closed terminal; some schedulers
}
RESUME = "Rerun the same command to resume."
_UNWINDING = 1.5  # seconds that the second Ctrl-C leaves for an orderly end


class StopRequest:
    """The signals of `EXIT_CODES` as a question that a loop can ask: `stop()`.

    The second Ctrl-C interrupts at once. Python handles a signal between two of its own
    instructions, so not while the device compiles or computes; a thread always receives
    it, and ends a process that has not ended by itself in time.

    Args:
      patience: seconds after the first signal until the process is ended wherever it
        is, for work that loses nothing by that. None: as long as it takes.
      is_alone: called before a process is ended, on which others may depend.
    """

    def __init__(
        self,
        patience: float | None = None,
        is_alone: Callable[[], bool] = lambda: True,
    ) -> None:
        self._event, self._left = threading.Event(), threading.Event()
        self._patience, self._is_alone = patience, is_alone
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        """Tells whether a signal came."""
        return self._event.is_set()

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handles the signals inside the context; main thread only."""
        heard, told = os.pipe()
        os.set_blocking(told, False)
        thread = threading.Thread(target=self._watch, args=(heard,), daemon=True)
        thread.start()
        before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        handlers = {
            number: signal.signal(number, self._handle) for number in answered()
        }
        try:
            yield self
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self._left.set()
            signal.set_wakeup_fd(before)
            os.close(told)
            thread.join()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        leave_terminal()
        self.signal = signal.Signals(number)
        self._event.set()

    def _watch(self, heard: int) -> None:
        """Reads the numbers of signals, as they come."""
        count = 0
        with open(heard, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] not in EXIT_CODES or self._left.is_set():
                    continue
                count += 1
                again = count > 1 and number[0] == signal.SIGINT
                wait = _UNWINDING if again else self._patience
                if wait is None or self._left.wait(wait) or not self._is_alone():
                    continue
                say(f"Stopped at once. {RESUME}")
                _end_at_once(number[0])


def leave_terminal() -> bool:
    """Shows nothing any more where the terminal is gone: to write there is an error.

    Returns:
      Whether it was gone.
    """
    gone = []
    for stream in (0, 1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:  # not of a file or a pipe
                gone.append(stream)
    if gone:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in gone:
            os.dup2(nowhere, stream)
        os.close(nowhere)
    return bool(gone)


def answered() -> list[signal.Signals]:
    """Returns the signals of `EXIT_CODES`, without SIGHUP where `nohup` ignores it."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [n for n in EXIT_CODES if n != signal.SIGHUP or not ignored]


def end_on_signals() -> None:
    """Makes the signals end the process at once: while it loads, and at its end.

    Both take seconds in which no work can be lost. While Python shuts down, it cannot
    handle signals: then they are ignored, and the exit code stands.
    """
    for number in answered():
        signal.signal(number, _end_at_once)
        atexit.register(signal.signal, number, signal.SIG_IGN)  # first in, last out


def _end_at_once(number: int, frame: FrameType | None = None) -> NoReturn:
    """Ends with the signal's exit code, and without a traceback."""
    del frame
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # the cursor, if a progress bar hid it
    os._exit(EXIT_CODES[signal.Signals(number)])


class OutputError(SystemExit):
    """Standard output cannot be written. The command ends; its work has not failed.

    Attributes:
      problem: with the output.
    """

    def __init__(self, problem: OSError):
        super().__init__(1)
        self.problem = problem


def say(text: str) -> None:
    """Prints one line about this process to standard error, if that exists."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(f"samrobust: {one_line(text)}", file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    r"""Puts a text of any origin on one line that a terminal shows as it is.

    >>> one_line("a\n  b\x1b[31m")
    'a b\\x1b[31m'
    """
    return shorten(" ".join(text.split()), most=2000)
