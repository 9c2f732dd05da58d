"""XLA's options for the programs of a process, by its backend.

What the user has set in the environment takes precedence. JAX is imported late, as in
`samrobust.system.runtime`.
"""

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterator

from samrobust.checks import check

__all__ = [
    "add_compiler_options",
    "check_compiler_options",
    "compiler_options",
    "deterministic_options",
    "deterministic_programs",
    "parse_compiler_options",
    "try_here",
]

# XLA's CPU compiler passes convolutions to YNNPACK, which at the sizes of this package
# takes 1.3 to 1.5 times as long as Eigen, its other choice. Reductions stay where they
# are: there YNNPACK is the faster one.
_YNN_FLAG = "xla_cpu_experimental_ynn_fusion_type"
# LLVM's first level compiles in two thirds of the time of XLA's usual one. Steps and
# attacks take as long: convolutions and products are in libraries.
_LEVEL = "xla_backend_optimization_level"
# oneDNN, in jaxlib 0.12 and newer, takes 0.75 to 0.9 times as long as Eigen for a
# convolution and its image's gradient. Its kernel's stays with Eigen, see
# `samrobust.models.conv`.
_CPU_OPTIONS: dict[str, str | bool] = {
    _YNN_FLAG: "LIBRARY_FUSION_TYPE_REDUCE",
    _LEVEL: "1",
    "xla_cpu_experimental_onednn_custom_call": True,
}
_DETERMINISTIC_FLAG = "xla_gpu_deterministic_ops"
_DETERMINISTIC = contextvars.ContextVar("deterministic_programs", default=False)
_added_options: dict[str, str | bool] = {}


@contextlib.contextmanager
def deterministic_programs(wanted: bool) -> Iterator[None]:
    """Adds to `compiler_options` what makes programs give the same bits at every run.

    On GPUs XLA then takes only algorithms that do, and chooses none of them by its
    time. Programs for CPUs are so anyway, and XLA has no other ones for TPUs.

    Args:
      wanted: false changes nothing.
    """
    token = _DETERMINISTIC.set(_DETERMINISTIC.get() or wanted)
    try:
        yield
    finally:
        _DETERMINISTIC.reset(token)


def compiler_options() -> dict[str, str | bool]:
    """Returns XLA options for a program on this process's devices.

    Given with each program (`jax.jit(..., compiler_options=...)`), so that nothing is
    written into the environment, where an option that this version of XLA does not know
    ends the process.

    Returns:
      What was found to be fastest on the backend, what `deterministic_programs` wants
      and, last, what `add_compiler_options` added.
    """
    import jax

    platform = jax.default_backend()
    found = _cpu_options() if platform == "cpu" else {}
    if _DETERMINISTIC.get():
        found = found | deterministic_options(platform)
    return found | _added_options


def deterministic_options(platform: str) -> dict[str, str | bool]:
    """Returns those of `deterministic_programs`, by the name of a platform."""
    return {_DETERMINISTIC_FLAG: True} if platform in ("gpu", "cuda", "rocm") else {}


def add_compiler_options(flags: str) -> None:
    """Adds options to every program that is compiled from now on.

    Args:
      flags: as in `XLA_FLAGS`, `--xla_a=1 --xla_b=true`.

    Raises:
      ValueError: for other words.
    """
    _added_options.update(parse_compiler_options(flags))


def parse_compiler_options(flags: str) -> dict[str, str | bool]:
    """Reads `XLA_FLAGS` as options of a program, of which true and false are bools.

    Raises:
      ValueError: for other words.

    >>> parse_compiler_options("--xla_a=1 --xla_b=true")
    {'xla_a': '1', 'xla_b': True}
    """
    found: dict[str, str | bool] = {}
    for word in flags.split():
        name, _, value = word.removeprefix("--").partition("=")
        named = word.startswith("--xla_") and bool(value)
        check(named, "--xla_NAME=VALUE, or several", flag=word)
        found[name] = {"true": True, "false": False}.get(value.lower(), value)
    return found


def check_compiler_options(
    flags: str, try_out: Callable[[dict[str, str | bool]], object]
) -> None:
    """Refuses options that XLA does not know, or values that it cannot read.

    XLA itself is asked, by a tiny program for the devices that the options are meant
    for: only the compiler of a TPU knows those of TPUs.

    Args:
      flags: as of `parse_compiler_options`.
      try_out: compiles something with them.

    Raises:
      ValueError: with XLA's complaint.
    """
    import jax

    options = parse_compiler_options(flags)
    try_out({})  # what goes wrong without them is not theirs
    try:
        try_out(options)
    except jax.errors.JaxRuntimeError as error:
        complaint = str(error).strip().splitlines()[0]
        given = {"--xla-flags": flags}
        check(False, "options that XLA knows", f"XLA says: {complaint}", **given)


def try_here(options: dict[str, str | bool]) -> None:
    """Compiles a trivial program for this process's devices."""
    import jax

    jax.jit(lambda: 0, compiler_options=options).lower().compile()


def _cpu_options() -> dict[str, str | bool]:
    """Returns those options that XLA knows and the user did not choose."""
    import jax

    flags = os.environ.get("XLA_FLAGS", "")
    if jax.config.read("jax_disable_most_optimizations"):  # it sets a level, too
        flags += _LEVEL
    return {
        name: value
        for name, value in _CPU_OPTIONS.items()
        if name not in flags and _is_known(name, value)
    }


@functools.cache
def _is_known(name: str, value: str | bool) -> bool:
    import jax

    try:
        try_here({name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True
