"""Settings of a process that runs experiments: compiler, memory, cache, signals.

Libraries must not touch such things; the `samrobust` command does, through this module
alone. What the user has set in the environment always wins.
"""

import contextlib
import ctypes
import functools
import os
import pathlib
import signal
import stat
import threading
import warnings
from collections.abc import Iterator
from types import FrameType

import jax

from samrobust.checks import check_choice

__all__ = [
    "StopRequest",
    "cache_folder",
    "compiler_options",
    "enable_compilation_cache",
    "keep_freed_memory",
    "trusted_cache_folder",
]

# XLA's CPU compiler hands convolutions to YNNPACK, which at the sizes of this package
# takes 1.3 to 1.5 times as long as Eigen, its other choice. Reductions stay where they
# are: there YNNPACK is the faster one.
_YNN_FLAG = "xla_cpu_experimental_ynn_fusion_type"
_CPU_OPTIONS: dict[str, str | bool] = {_YNN_FLAG: "LIBRARY_FUSION_TYPE_REDUCE"}

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_RESERVE, _HUGE_PAGE = 2**32, 2**21  # bytes; huge pages as on x86-64
_MADV_HUGEPAGE = 14  # from Linux's mman.h


def cache_folder() -> pathlib.Path:
    """`$XDG_CACHE_HOME/samrobust`, by default `~/.cache/samrobust`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(base) / "samrobust"


def trusted_cache_folder(name: str = "") -> pathlib.Path | None:
    """The cache folder, or one within, made where it is missing; None if not private.

    Compiled programs are run and arrays believed as they are found there. So nobody
    else may write to it; it is made with mode 0700.

    Args:
      name: of the folder within, as `xla`; empty for the cache folder itself.

    Warns:
      UserWarning: once a process, where it is not this user's alone or cannot be made.
    """
    return _private(cache_folder()) and _private(cache_folder() / name)


@functools.cache
def _private(folder: pathlib.Path) -> pathlib.Path | None:
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid():
            problem = f"is owned by user {found.st_uid}. Remove it, or set"
        elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            problem = "can be written by others. Remove it, or set"
        else:
            return folder
    except OSError as error:
        problem = f"cannot be made ({error}). Set"
    message = f"The cache {folder} is not used: it {problem} XDG_CACHE_HOME."
    warnings.warn(message, stacklevel=3)
    return None


_SWITCH = ("on", "off", "1", "0")


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a restart is fast.

    Does nothing if `JAX_COMPILATION_CACHE_DIR` is set (JAX heeds it by itself), or if
    `SAMROBUST_COMPILATION_CACHE=off`; nor where the folder is not this user's alone.

    Raises:
      ValueError: if `SAMROBUST_COMPILATION_CACHE` is neither on nor off.
    """
    wanted = os.environ.get("SAMROBUST_COMPILATION_CACHE", "").lower() or "on"
    check_choice(_SWITCH, SAMROBUST_COMPILATION_CACHE=wanted)
    if wanted in ("off", "0") or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    if folder := trusted_cache_folder("xla"):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@functools.cache
def compiler_options() -> dict[str, str | bool]:
    """XLA options for a training or evaluation program on this process's devices.

    Given with each program (`jax.jit(..., compiler_options=...)`), so that nothing is
    written into the environment. Empty on GPU and TPU, if `XLA_FLAGS` names the option
    itself, or if this version of XLA does not know it.
    """
    if jax.default_backend() != "cpu" or _YNN_FLAG in os.environ.get("XLA_FLAGS", ""):
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=_CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return _CPU_OPTIONS


def keep_freed_memory() -> bool:
    """Makes glibc keep what is freed instead of handing it back to the kernel.

    XLA's CPU client allocates the memory of a program anew at every call. Handed back
    in between, it comes as fresh pages: a tenth of a training step goes into faulting
    them in. Linux with glibc only; does nothing where `MALLOC_*` or `GLIBC_TUNABLES`
    are set in the environment.

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

    Reserved and freed untouched, it takes no memory before it is used.
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
